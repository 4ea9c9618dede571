//! A build's log: one JSON object a line in a file, written as it happens and read from any place
//! while it grows. It outlives the service, and goes with its template.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::Serialize;
use time::OffsetDateTime;
use tokio::sync::watch;

/// Output beyond this is not kept.
const MAX_BYTES: u64 = 16 << 20;

/// What a line tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The template's state changed.
    State,
    /// A step begins.
    Step,
    /// Standard output of a step.
    Stdout,
    /// Standard error of a step.
    Stderr,
    /// The build ended, well or not.
    End,
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(with = "time::serde::rfc3339")]
    time: OffsetDateTime,
    kind: Kind,
    /// From 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    step: Option<usize>,
    text: &'a str,
}

/// How far a log has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extent {
    /// Bytes written.
    pub bytes: u64,
    /// No more will come.
    pub ended: bool,
}

/// A log being written; cheap to share.
#[derive(Debug, Clone)]
pub struct BuildLog {
    path: PathBuf,
    // `None` when the file could not be made: a build does not fail for its log.
    file: Arc<Mutex<Option<File>>>,
    extent: watch::Sender<Extent>,
}

impl BuildLog {
    /// Starts a log anew.
    pub fn create(path: &Path) -> Self {
        let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        let file = made.and_then(|()| File::create(path)).inspect_err(|e| {
            tracing::warn!(?path, "cannot keep the build's log: {e}");
        });
        Self {
            path: path.to_owned(),
            file: Arc::new(Mutex::new(file.ok())),
            extent: watch::Sender::new(Extent::default()),
        }
    }

    /// A log of a build that has ended, as an earlier service left it.
    pub fn ended(path: &Path) -> Self {
        let bytes = std::fs::metadata(path).map_or(0, |m| m.len());
        Self {
            path: path.to_owned(),
            file: Arc::default(),
            extent: watch::Sender::new(Extent { bytes, ended: true }),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How far it has come, now and later.
    pub fn watch(&self) -> watch::Receiver<Extent> {
        self.extent.subscribe()
    }

    /// Adds a line.
    pub fn write(&self, kind: Kind, step: Option<usize>, text: &str) {
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let so_far = self.extent.borrow().bytes;
        let is_output = matches!(kind, Kind::Stdout | Kind::Stderr);
        if let Some(open) = file.as_mut()
            && (so_far < MAX_BYTES || !is_output)
        {
            let line = Line { time: OffsetDateTime::now_utc(), kind, step, text };
            match append(open, &line) {
                Ok(bytes) => self.extent.send_modify(|e| e.bytes += bytes),
                Err(e) => {
                    tracing::warn!(path = ?self.path, "cannot go on with the build's log: {e}");
                    *file = None;
                }
            }
        }
        if kind == Kind::End {
            *file = None;
            self.extent.send_modify(|e| e.ended = true);
        }
    }
}

fn append(file: &mut File, line: &Line<'_>) -> io::Result<u64> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text)?;
    Ok(text.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reader_sees_whole_lines_and_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = BuildLog::create(&dir.path().join("logs/a"));
        let mut seen = log.watch();
        log.write(Kind::Step, Some(1), "run x");
        let extent = *seen.wait_for(|e| e.bytes > 0).await.unwrap();
        let text = std::fs::read_to_string(log.path()).unwrap();
        assert_eq!(text.len() as u64, extent.bytes);
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((line["kind"].as_str(), line["step"].as_u64()), (Some("step"), Some(1)));
        log.write(Kind::End, None, "ready");
        assert!(seen.wait_for(|e| e.ended).await.is_ok());
        let after = BuildLog::ended(log.path());
        assert_eq!(*after.watch().borrow(), *seen.borrow());
    }

    #[test]
    fn a_log_that_cannot_be_made_is_no_failure() {
        let log = BuildLog::create(Path::new("/proc/none/log"));
        log.write(Kind::Stdout, Some(1), "x");
        log.write(Kind::End, None, "failed");
        assert!(log.watch().borrow().ended);
    }
}
