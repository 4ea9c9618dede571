//! A command's frames as `process.ProcessEvent` messages.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::Stream;
use guest_agent::client::{AgentError, ExecStream};
use guest_agent::wire::{Chunk, ExecExit, ExecFrame};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::e2b::rpc::{Code, RpcError};

/// How a command's output is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// On two streams.
    Pipes,
    /// On a terminal.
    Terminal,
}

/// The messages of a command, to its end or until the client's time is up.
pub fn events(
    frames: ExecStream,
    output: Output,
    timeout: Option<Duration>,
) -> impl Stream<Item = Result<Value, RpcError>> + Send + 'static {
    let until = timeout.map(|timeout| Instant::now() + timeout);
    futures_util::stream::unfold(Some(frames), move |frames| async move {
        let mut frames = frames?;
        let next = match until {
            Some(until) => tokio::time::timeout_at(until, frames.next_frame()).await,
            None => Ok(frames.next_frame().await),
        };
        let Ok(next) = next else { return Some((Err(time_is_up()), None)) };
        match next {
            Ok(Some(frame)) => match event(frame, output) {
                Ok(event) => Some((Ok(json!({ "event": event })), Some(frames))),
                Err(error) => Some((Err(error), None)),
            },
            Ok(None) => None,
            Err(error) => Some((Err(broken(&error)), None)),
        }
    })
}

fn time_is_up() -> RpcError {
    RpcError::new(Code::DeadlineExceeded, "the time that the client gave the command is up")
}

/// The sandbox was paused, or is gone: the SDKs look which.
fn broken(error: &AgentError) -> RpcError {
    let text = format!("the connection to the sandbox ended before the command did: {error}");
    RpcError::new(Code::Unavailable, text)
}

fn event(frame: ExecFrame, output: Output) -> Result<Value, RpcError> {
    Ok(match frame {
        ExecFrame::Started(started) => json!({ "start": { "pid": started.pid } }),
        ExecFrame::Stdout(chunk) if output == Output::Terminal => data("pty", chunk)?,
        ExecFrame::Stdout(chunk) => data("stdout", chunk)?,
        ExecFrame::Stderr(chunk) => data("stderr", chunk)?,
        ExecFrame::Keepalive(_) => json!({ "keepalive": {} }),
        ExecFrame::Exit(exit) if exit.timed_out => return Err(time_is_up()),
        ExecFrame::Exit(exit) => json!({ "end": end(&exit) }),
        ExecFrame::Error(error) => return Err(RpcError::new(Code::Internal, error.message)),
    })
}

fn data(stream: &str, chunk: Chunk) -> Result<Value, RpcError> {
    let bytes = chunk.into_bytes();
    let bytes = bytes.ok_or_else(|| RpcError::new(Code::Internal, "output is not base64"))?;
    Ok(json!({ "data": { stream: STANDARD.encode(bytes) } }))
}

/// A command that a signal ended has not exited, and so has no exit code of its own.
fn end(exit: &ExecExit) -> Value {
    match &exit.signal {
        Some(signal) => {
            let status = format!("signal: {signal}");
            json!({ "exitCode": -1, "exited": false, "status": status, "error": status })
        }
        None => {
            let status = format!("exit status {}", exit.code);
            let mut end = json!({ "exitCode": exit.code, "exited": true, "status": status });
            if exit.code != 0 {
                end["error"] = status.into();
            }
            end
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_agent::wire::{Keepalive, Started};

    fn of(frame: ExecFrame, output: Output) -> Value {
        event(frame, output).unwrap_or_else(|e| json!(e))
    }

    fn exit(code: i32, signal: Option<&str>, timed_out: bool) -> ExecFrame {
        let signal = signal.map(str::to_owned);
        ExecFrame::Exit(ExecExit { code, signal, timed_out, duration_ms: 1 })
    }

    #[test]
    fn frames_become_events() {
        let pipes = |frame| of(frame, Output::Pipes);
        assert_eq!(pipes(ExecFrame::Started(Started { pid: 7 })), json!({ "start": { "pid": 7 } }));
        let chunk = Chunk::from_bytes(b"a\xff");
        assert_eq!(
            pipes(ExecFrame::Stdout(chunk.clone())),
            json!({ "data": { "stdout": "Yf8=" } })
        );
        assert_eq!(
            of(ExecFrame::Stdout(chunk), Output::Terminal),
            json!({ "data": { "pty": "Yf8=" } })
        );
        assert_eq!(pipes(ExecFrame::Keepalive(Keepalive {})), json!({ "keepalive": {} }));
    }

    #[test]
    fn an_end_says_how() {
        let end = |frame| of(frame, Output::Pipes)["end"].clone();
        let wanted = json!({ "exitCode": 0, "exited": true, "status": "exit status 0" });
        assert_eq!(end(exit(0, None, false)), wanted);
        assert_eq!(end(exit(3, None, false))["error"], "exit status 3");
        let killed = end(exit(137, Some("SIGKILL"), false));
        assert_eq!((&killed["exitCode"], &killed["exited"]), (&json!(-1), &json!(false)));
        let late = event(exit(137, Some("SIGKILL"), true), Output::Pipes);
        assert_eq!(late.map_err(|e| e.code()), Err(Code::DeadlineExceeded));
    }
}
