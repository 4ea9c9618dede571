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
use std::sync::mpsc;
use std::time::Duration;

use rusqlite::Connection;
use snapshotter::priority;
use tokio::sync::oneshot;

pub use idempotency::Known;
pub use templates::TemplateRow;
pub use vms::{Stage, StoredIdentity, VmRow};

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
        schema::migrate(&mut connection)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let run = move || {
            // Requests wait for it.
            priority::hurry_this_thread();
            for job in queue {
                job(&mut connection);
            }
        };
        std::thread::Builder::new()
            .name("state-db".to_owned())
            .spawn(run)
            .map_err(|_| DbError::Closed)?;
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
