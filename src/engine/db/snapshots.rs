//! Rows for snapshots of sandboxes.

use super::{Db, DbError};
use crate::engine::snapshots::SandboxSnapshot;

fn malformed(source: serde_json::Error) -> DbError {
    DbError::Malformed { what: "snapshot", source }
}

impl Db {
    /// A snapshot was published.
    pub async fn snapshot_put(&self, snapshot: &SandboxSnapshot) -> Result<(), DbError> {
        let id = snapshot.id.clone();
        let text = serde_json::to_string(snapshot).map_err(malformed)?;
        self.run(move |c| {
            c.execute("INSERT INTO snapshots (id, snapshot) VALUES (?1, ?2)", [id, text])?;
            Ok(())
        })
        .await
    }

    /// A snapshot is about to be removed.
    pub async fn snapshot_gone(&self, id: &str) -> Result<(), DbError> {
        let id = id.to_owned();
        self.run(move |c| {
            c.execute("DELETE FROM snapshots WHERE id = ?1", [id])?;
            Ok(())
        })
        .await
    }

    /// Every snapshot the database knows.
    pub async fn snapshots(&self) -> Result<Vec<SandboxSnapshot>, DbError> {
        self.run(|c| {
            let mut statement = c.prepare("SELECT snapshot FROM snapshots")?;
            let rows = statement.query_map([], |row| row.get::<_, String>(0))?;
            rows.map(|row| serde_json::from_str(&row?).map_err(malformed)).collect()
        })
        .await
    }
}
