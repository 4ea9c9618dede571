//! Life of a command after its start: output to frames, the time limit, the last frame.
//!
//! ```text
//! running -- ends by itself ---------------------------> draining --> exit frame
//!    \------ time is up, or nobody listens: SIGKILL ---/
//! ```

use super::process::{Process, frame};
use super::reap::{self, Ended};
use super::streams::{Ends, Stream, read};
use crate::agent::Agent;
use crate::wire::{Chunk, ExecExit, ExecFrame, Keepalive};
use bytes::Bytes;
use nix::sys::signal::Signal;
use std::cell::Cell;
use std::future::pending;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::time::{Instant, sleep_until};

/// A silent command sends a frame this often.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Somebody else may hold the output open after the command has ended. What was written before is
/// there already, so the wait for more is short...
const DRAIN_IDLE: Duration = Duration::from_millis(100);
/// ... and a process that goes on writing is not followed for ever.
const DRAIN_BYTES: usize = 1024 * 1024;

/// One of the two outputs.
struct Source {
    stream: Option<Stream>,
    stderr: bool,
    /// Start of a character whose end has not been read yet.
    carry: Vec<u8>,
}

impl Source {
    fn new(stream: Option<Stream>, stderr: bool) -> Self {
        Self { stream, stderr, carry: Vec::new() }
    }

    /// The next piece as a frame; `None` at the end. Cancelling it loses nothing.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let Some(stream) = self.stream.clone() else { return pending().await };
            let (carry, stderr) = (&mut self.carry, self.stderr);
            match read(&stream, |data| piece(carry, data, stderr)).await {
                Ok((_, Some(line))) => return Some(line),
                Ok((false, None)) => {}
                Ok((true, None)) | Err(_) => {
                    self.stream = None;
                    return None;
                }
            }
        }
    }

    fn ended(&self) -> bool {
        self.stream.is_none()
    }
}

/// Whether the output has ended, and a frame of what can be handed out. A character that is cut
/// off at the end of what was read waits for the rest, so that text stays text.
fn piece(carry: &mut Vec<u8>, data: &[u8], stderr: bool) -> (bool, Option<Bytes>) {
    let end = data.is_empty();
    let mut joined;
    let mut whole = data;
    if !carry.is_empty() {
        joined = std::mem::take(carry);
        joined.extend_from_slice(data);
        whole = &joined;
    }
    if !end
        && let Err(error) = std::str::from_utf8(whole)
        && error.error_len().is_none()
    {
        let (now, later) = whole.split_at(error.valid_up_to());
        *carry = later.to_vec();
        whole = now;
    }
    if whole.is_empty() {
        return (end, None);
    }
    let chunk = Chunk::from_bytes(whole);
    (end, Some(frame(&if stderr { ExecFrame::Stderr(chunk) } else { ExecFrame::Stdout(chunk) })))
}

/// Follows the command to its end.
pub async fn run(
    agent: Rc<Agent>,
    process: Rc<Process>,
    pidfd: OwnedFd,
    ends: Ends,
    timeout: Option<Duration>,
) {
    let started = Instant::now();
    let timed_out = Cell::new(false);
    let ended = tokio::select! {
        ended = pump(&process, pidfd, ends) => ended,
        () = guard(&process, timeout, &timed_out) => return,
    };
    agent.processes.remove(&process);
    let last = match ended {
        Ok(ended) => ExecFrame::Exit(ExecExit {
            code: ended.code,
            signal: ended.signal,
            timed_out: timed_out.get(),
            duration_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        }),
        Err(error) => ExecFrame::Error(crate::wire::ErrorBody {
            error_code: crate::wire::codes::INTERNAL.to_owned(),
            message: format!("process {} was lost: {error}", process.info.pid),
        }),
    };
    process.finish(frame(&last)).await;
}

/// Kills the command when its time is up or nobody listens any more. Never returns.
async fn guard(process: &Process, timeout: Option<Duration>, timed_out: &Cell<bool>) {
    let deserted = async {
        if process.background {
            pending::<()>().await;
        }
        while let Some(listener) = process.any_listener() {
            listener.closed().await;
        }
    };
    let time_is_up = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => pending().await,
        }
    };
    tokio::select! {
        () = time_is_up => timed_out.set(true),
        () = deserted => {}
    }
    process.signal(Signal::SIGKILL);
    pending::<()>().await;
}

async fn pump(process: &Process, pidfd: OwnedFd, ends: Ends) -> std::io::Result<Ended> {
    let pidfd = crate::watch::watch(pidfd, Interest::READABLE)?;
    let mut stdout = Source::new(Some(ends.stdout), false);
    let mut stderr = Source::new(ends.stderr, true);
    let mut ended: Option<Ended> = None;
    let mut quiet_since = Instant::now();
    let mut drained = 0;
    loop {
        if let Some(end) = &ended
            && ((stdout.ended() && stderr.ended()) || drained > DRAIN_BYTES)
        {
            return Ok(end.clone());
        }
        let patience = if ended.is_some() { DRAIN_IDLE } else { KEEPALIVE };
        let line = tokio::select! {
            biased;
            line = stdout.next() => line,
            line = stderr.next() => line,
            ready = pidfd.readable(), if ended.is_none() => {
                match reap::wait(pidfd.get_ref(), libc::WNOHANG) {
                    Some(end) => {
                        process.set_reaped();
                        ended = Some(end);
                        quiet_since = Instant::now();
                    }
                    None => ready?.clear_ready(),
                }
                continue;
            }
            () = sleep_until(quiet_since + patience) => match &ended {
                Some(end) => return Ok(end.clone()),
                None => Some(frame(&ExecFrame::Keepalive(Keepalive {}))),
            },
        };
        quiet_since = Instant::now();
        if let Some(line) = line {
            drained += if ended.is_some() { line.len() } else { 0 };
            // A keepalive is remembered like output; it is tiny and harmless when repeated.
            process.publish(line, true).await;
            quiet_since = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_not_torn() {
        let mut carry = Vec::new();
        let text = "aé".as_bytes();
        let (end, line) = piece(&mut carry, &text[..2], false);
        assert!(!end);
        assert_eq!(line.unwrap(), "{\"type\":\"stdout\",\"data\":\"a\",\"encoding\":\"utf8\"}\n");
        let (_, line) = piece(&mut carry, &text[2..], false);
        assert_eq!(line.unwrap(), "{\"type\":\"stdout\",\"data\":\"é\",\"encoding\":\"utf8\"}\n");
        let (_, line) = piece(&mut carry, &[0xc3], true);
        assert_eq!(line, None);
        let (end, line) = piece(&mut carry, &[], true);
        assert!(end);
        assert_eq!(
            line.unwrap(),
            "{\"type\":\"stderr\",\"data\":\"ww==\",\"encoding\":\"base64\"}\n"
        );
    }
}
