//! What the agent was asked and how that went: a line for each request, in memory like all of `/run`.
//!
//! ```text
//! 1795830000.123456 ki2v0f5q6m1s8d3h7x9a POST /exec 200 913us
//! when (Unix time)  the service's request       answer, and the time to its head
//! ```

use nix::time::{ClockId, clock_gettime};
use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// Where it is; only root reads it.
pub const PATH: &str = "/run/rethaw/agent.log";
/// Beyond this it starts anew: it is memory of the guest's.
const MAX_BYTES: u64 = 256 << 10;
/// Bytes of a path that are kept.
const MAX_PATH: usize = 200;

/// A request that was answered.
#[derive(Debug, Clone, Copy)]
pub struct Line<'a> {
    /// The service's name for what it was asked itself, when it was.
    pub request: Option<&'a str>,
    /// Method.
    pub method: &'a str,
    /// Path, without the query: that is the user's.
    pub path: &'a str,
    /// Status of the answer.
    pub status: u16,
    /// From its head to the answer's.
    pub micros: u64,
}

/// The log. It is never a reason for anything to fail.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: RefCell<Option<File>>,
}

impl Log {
    /// A log at this path, which need not be there.
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: RefCell::default() }
    }

    /// Adds a line.
    pub fn write(&self, line: &Line<'_>) {
        let mut file = self.file.borrow_mut();
        // Tried once more with the next line.
        if self.append(&mut file, line).is_err() {
            *file = None;
        }
    }

    /// Forgets all lines.
    pub fn clear(&self) {
        let _ = self.file.borrow().as_ref().map(|file| file.set_len(0));
    }

    fn append(&self, file: &mut Option<File>, line: &Line<'_>) -> io::Result<()> {
        let file = match file {
            Some(file) => file,
            None => file.insert(self.open()?),
        };
        if file.metadata()?.len() > MAX_BYTES {
            file.set_len(0)?;
        }
        let Line { request, method, path, status, micros } = line;
        let (request, path) = (request.unwrap_or("-"), shown(path));
        let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
        let (seconds, fraction) = (now.tv_sec(), now.tv_nsec() / 1000);
        let text =
            format!("{seconds}.{fraction:06} {request} {method} {path} {status} {micros}us\n");
        // In one piece: a machine is frozen between any two.
        file.write_all(text.as_bytes())
    }

    fn open(&self) -> io::Result<File> {
        let open = || OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path);
        match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.path.parent().map_or(Ok(()), fs::create_dir_all)?;
                open()
            }
            result => result,
        }
    }
}

fn shown(path: &str) -> &str {
    let end = (0..=MAX_PATH.min(path.len())).rev().find(|end| path.is_char_boundary(*end));
    &path[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(path: &str) -> Line<'_> {
        Line { request: Some("r-1"), method: "POST", path, status: 200, micros: 7 }
    }

    #[test]
    fn a_line_says_what_was_asked_for_whom_and_how_it_went() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/agent.log");
        let log = Log::new(path.clone());
        log.write(&line("/exec"));
        log.write(&Line { request: None, ..line("/claim") });
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
        assert_eq!(lines, ["r-1 POST /exec 200 7us", "- POST /claim 200 7us"]);
        // A successor of the agent goes on with it.
        Log::new(path.clone()).write(&line("/files"));
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
        log.clear();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn it_stays_small() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.log");
        let log = Log::new(path.clone());
        let long = format!("/{}", "ä".repeat(10_000));
        for _ in 0..3000 {
            log.write(&line(&long));
        }
        let size = fs::metadata(&path).unwrap().len();
        assert!((1..MAX_BYTES + 300).contains(&size), "{size}");
    }
}
