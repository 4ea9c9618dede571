//! QEMU's line monitor (HMP), for the one command that a claim waits for.
//!
//! QEMU reads its JSON control socket byte by byte, on a thread of its own, and hands each command on to
//! its main loop. `c` on the line monitor is two bytes, read by the main loop itself. Nothing is awaited
//! here: that the vCPUs run shows in what the guest does.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;

/// A connection to one QEMU's line monitor.
#[derive(Debug)]
pub(super) struct Line(Mutex<UnixStream>);

impl Line {
    /// Connects; the socket must already be listening.
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_nonblocking(true)?;
        Ok(Self(Mutex::new(stream)))
    }

    /// Has the vCPUs run, some time soon.
    pub(super) fn resume(&self) -> io::Result<()> {
        let mut stream = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // What it said so far: banner, prompts, the echo. Left there, it would one day be more than
        // the socket holds.
        let mut said = [0; 4096];
        loop {
            match stream.read(&mut said) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        stream.write_all(b"c\n")
    }
}
