//! Dialling the guest through Firecracker's vsock: a unix socket on the host, one line each way,
//! then bytes.
//!
//! ```text
//!   host:  CONNECT 7000\n        Firecracker:  OK 1073741824\n      or it hangs up
//! ```
//!
//! The retry rule. While a guest boots, nobody listens and Firecracker hangs up: trying again is
//! right. Right after a restore the guest gets a transport reset, which takes an attempt that was
//! early with it, and some Firecracker versions then never answer that attempt: so one attempt waits
//! for a part of the time only, and gets longer each time. When the deadline passes, the caller
//! must take the VM as lost; a later attempt would meet the same guest.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::api;

/// The first attempt waits this long for an answer; each next one twice as long.
const FIRST_ATTEMPT: Duration = Duration::from_millis(250);
/// Between attempts that fail at once.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Why the guest could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The deadline passed.
    #[error(
        "guest port {port} did not answer within {after:?} ({attempts} attempts, last: {last})"
    )]
    Timeout {
        /// The guest's port.
        port: u32,
        /// The deadline.
        after: Duration,
        /// How often it was tried.
        attempts: u32,
        /// What the last attempt came to.
        last: String,
    },
    /// Something other than Firecracker answered.
    #[error("guest port {port}: {answer:?} is not an answer of Firecracker's")]
    NotFirecracker {
        /// The guest's port.
        port: u32,
        /// What came.
        answer: String,
    },
}

/// Connects to `port` of the guest whose vsock is `socket`.
pub async fn dial(socket: &Path, port: u32, deadline: Duration) -> Result<UnixStream, DialError> {
    let until = Instant::now() + deadline;
    let (mut wait, mut pause) = (FIRST_ATTEMPT, FIRST_PAUSE);
    let mut attempts = 0;
    loop {
        attempts += 1;
        let end = until.min(Instant::now() + wait);
        let last = match tokio::time::timeout_at(end, attempt(socket, port)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(e)) if e.kind() == io::ErrorKind::InvalidData => {
                return Err(DialError::NotFirecracker { port, answer: e.to_string() });
            }
            Ok(Err(e)) => {
                tokio::time::sleep_until(until.min(Instant::now() + pause)).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                e.to_string()
            }
            Err(_) => {
                wait *= 2;
                "no answer".to_owned()
            }
        };
        if Instant::now() >= until {
            return Err(DialError::Timeout { port, after: deadline, attempts, last });
        }
    }
}

async fn attempt(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = api::connect(socket).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    // Byte by byte: what follows the line is the guest's and must not be taken.
    let mut line = Vec::with_capacity(32);
    loop {
        match stream.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) => line.push(byte),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(e.kind(), "nobody listens there in the guest"));
            }
            Err(e) => return Err(e),
        }
        if line.len() > 32 {
            break;
        }
    }
    let text = String::from_utf8_lossy(&line);
    match text.strip_prefix("OK ").map(str::parse::<u32>) {
        Some(Ok(_)) => Ok(stream),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, text.into_owned())),
    }
}

#[cfg(test)]
mod tests;
