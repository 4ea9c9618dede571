//! Rows for API keys.

use rusqlite::params;

use super::{Db, DbError};
use crate::engine::keys::Key;

impl Db {
    /// Every key with its digest.
    pub async fn keys(&self) -> Result<Vec<([u8; 32], Key)>, DbError> {
        self.run(|c| {
            let mut statement = c.prepare("SELECT digest, key FROM api_keys")?;
            let rows = statement
                .query_map([], |row| Ok((row.get::<_, [u8; 32]>(0)?, row.get::<_, String>(1)?)))?;
            rows.map(|row| {
                let (digest, key) = row?;
                let key = serde_json::from_str(&key);
                let key = key.map_err(|source| DbError::Malformed { what: "API key", source })?;
                Ok((digest, key))
            })
            .collect()
        })
        .await
    }

    /// Adds a key; false if its name is taken.
    pub async fn key_put(&self, digest: [u8; 32], key: &Key) -> Result<bool, DbError> {
        let (id, name) = (key.id.clone(), key.name.clone());
        let key = serde_json::to_string(key);
        let key = key.map_err(|source| DbError::Malformed { what: "API key", source })?;
        self.run(move |c| {
            let sql = "INSERT INTO api_keys (id, name, digest, key) VALUES (?1, ?2, ?3, ?4)
                       ON CONFLICT (name) DO NOTHING";
            Ok(c.execute(sql, params![id, name, digest, key])? == 1)
        })
        .await
    }

    /// Removes a key.
    pub async fn key_gone(&self, id: &str) -> Result<(), DbError> {
        let id = id.to_owned();
        self.run(move |c| {
            c.execute("DELETE FROM api_keys WHERE id = ?1", [id])?;
            Ok(())
        })
        .await
    }
}
