//! The audit log: who changed what, as JSON lines that are only ever appended.
//!
//! `audit.log` in the home directory; at [`MAX_BYTES`] it becomes `audit.log.1`, that `.2` and so
//! on, and of those [`KEPT`] stay. Requests that only look are not in it, but refused ones of any
//! kind are. Bodies are not: they may hold secrets.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};

use serde::Serialize;
use time::OffsetDateTime;
use uffd_handler::log_file::LogFile;

/// Size at which a new file is begun.
const MAX_BYTES: u64 = 16 << 20;
/// Older files that are kept.
const KEPT: u32 = 4;
/// Lines on their way to the disk; a request waits for none of them.
const QUEUE: usize = 4096;

/// Who did something.
#[derive(Debug, Clone, Serialize)]
pub struct Actor {
    /// `key`, `token` or `nobody`.
    pub kind: &'static str,
    /// The key's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The key's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

impl Actor {
    /// Somebody without a key.
    pub const NOBODY: Self = Self { kind: "nobody", name: None, id: None };
}

/// One request.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// When it was answered.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// As in `X-Request-Id`.
    pub request_id: String,
    /// Who asked.
    pub actor: Actor,
    /// From where, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// HTTP method.
    pub method: String,
    /// Path without the query.
    pub path: String,
    /// What was made, if the path does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub made: Option<String>,
    /// Status of the answer.
    pub status: u16,
    /// From request to answer.
    pub duration_ms: f64,
}

/// The way to the log.
#[derive(Debug, Clone)]
pub struct Audit {
    lines: SyncSender<Vec<u8>>,
}

impl Audit {
    /// Opens the log, and starts the thread that writes it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut log = Log::open(path)?;
        let (lines, queue) = sync_channel::<Vec<u8>>(QUEUE);
        let write = move || {
            for line in queue {
                if let Err(e) = log.append(&line) {
                    tracing::error!("audit log {}: {e}", log.0.path().display());
                    metrics::counter!("rethaw_audit_lost_total").increment(1);
                }
            }
        };
        std::thread::Builder::new().name("audit".to_owned()).spawn(write)?;
        Ok(Self { lines })
    }

    /// Notes a request. When the disk is far behind, lines are dropped and counted.
    pub fn note(&self, entry: &Entry) {
        let Ok(mut line) = serde_json::to_vec(entry) else { return };
        line.push(b'\n');
        if self.lines.try_send(line).is_err() {
            metrics::counter!("rethaw_audit_lost_total").increment(1);
        }
    }
}

struct Log(LogFile);

impl Log {
    fn open(path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        options.mode(0o600);
        LogFile::open(path, options, MAX_BYTES, KEPT).map(Self)
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        self.0.make_room(line.len())?;
        self.0.write_all(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded_and_its_end_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let mut log = Log::open(&path).unwrap();
        let line = vec![b'x'; (MAX_BYTES / 2 + 1) as usize];
        for _ in 0..8 {
            log.append(&line).unwrap();
        }
        log.append(b"last\n").unwrap();
        let mut names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().collect();
        names.sort_by_key(std::fs::DirEntry::file_name);
        assert_eq!(names.len(), 1 + KEPT as usize);
        assert!(names.iter().all(|f| f.metadata().unwrap().len() <= MAX_BYTES));
        assert!(std::fs::read(&path).unwrap().ends_with(b"last\n"));
        // A new service goes on where the old one stopped.
        drop(log);
        Log::open(&path).unwrap().append(b"more\n").unwrap();
        assert!(std::fs::read(&path).unwrap().ends_with(b"last\nmore\n"));
    }
}
