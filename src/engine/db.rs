//! The state that must survive the service: SQLite in WAL mode, on a thread of its own.
//!
//! Intent is written before a side effect: a row in `vms` exists before its process does, and goes
//! only after the process, its memory and its files are gone. After a crash every row is therefore
//! either a VM to take back or one to clean up.

mod idempotency;
mod keys;
mod schema;
mod snapshots;
mod templates;
mod vms;

use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use rusqlite::Connection;
use snapshotter::priority;
use tokio::sync::oneshot;

pub use idempotency::Known;
pub use templates::TemplateRow;
pub use vms::{Stage, StoredIdentity, VmRow};

/// How often what was written is moved from the log to the database's own file.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// Handle to the database thread.
#[derive(Debug, Clone)]
pub struct Db {
    jobs: mpsc::Sender<Job>,
}

/// Why the database failed.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// SQLite's own words.
    #[error("state database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// A stored value does not parse.
    #[error("state database holds a malformed {what}: {source}")]
    Malformed {
        /// What it was.
        what: &'static str,
        /// Why.
        source: serde_json::Error,
    },
    /// Two live or paused VMs would share a part of their identity.
    #[error("identity is not unique: another VM has this {0}")]
    NotUnique(String),
    /// The thread is gone.
    #[error("state database is closed")]
    Closed,
}

impl Db {
    /// Opens (or makes) the database and brings its schema up to date.
    pub fn open(path: &Path) -> Result<Self, DbError> {
        let mut connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        // In WAL mode NORMAL loses no committed transaction when the process dies, only when the
        // machine does; then every VM is gone as well.
        connection.pragma_update(None, "synchronous", "normal")?;
        connection.pragma_update(None, "foreign_keys", "on")?;
        connection.busy_timeout(Duration::from_secs(5))?;
        // That syncs the disk, which takes 10 to 40 ms: not on the thread that requests wait for.
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        schema::migrate(&mut connection)?;
        let checkpoints = Connection::open(path)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let (open, closed) = mpsc::channel();
        let run = move || {
            let _open: mpsc::Sender<()> = open;
            // Requests wait for it.
            priority::hurry_this_thread();
            for job in queue {
                job(&mut connection);
            }
        };
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
            thread.map_err(|_| DbError::Closed)
        };
        spawn("state-db", Box::new(run))?;
        spawn("state-sync", Box::new(move || checkpoint(&checkpoints, &closed)))?;
        Ok(Self { jobs })
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, DbError> + Send + 'static,
    ) -> Result<T, DbError> {
        let (tx, rx) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            // The asker may have gone away; the write is done all the same.
            let _ = tx.send(work(connection));
        });
        self.jobs.send(job).map_err(|_| DbError::Closed)?;
        rx.await.map_err(|_| DbError::Closed)?
    }
}

/// Keeps the log short until the database is closed. Writers go on meanwhile.
fn checkpoint(connection: &Connection, closed: &mpsc::Receiver<()>) {
    while closed.recv_timeout(CHECKPOINT_EVERY) == Err(RecvTimeoutError::Timeout) {
        let done = connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        if let Err(e) = done {
            tracing::warn!("state database: checkpoint: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_gets_into_the_database_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db");
        let db = Db::open(&path).unwrap();
        let write = |c: &mut Connection| {
            Ok(c.execute_batch("CREATE TABLE kept (n); INSERT INTO kept VALUES (42)")?)
        };
        db.run(write).await.unwrap();
        // The file alone, without its log.
        let alone = dir.path().join("alone.db");
        let started = std::time::Instant::now();
        loop {
            std::fs::copy(&path, &alone).unwrap();
            let copy = Connection::open(&alone).unwrap();
            let found = copy.query_row("SELECT n FROM kept", [], |row| row.get::<_, i64>(0));
            if found.is_ok_and(|n| n == 42) {
                break;
            }
            assert!(started.elapsed() < CHECKPOINT_EVERY * 4, "still only in the log");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
