//! Rows for templates and pool targets.

use rusqlite::params;

use super::{Db, DbError};

/// One template.
#[derive(Debug, Clone)]
pub struct TemplateRow {
    /// Its name.
    pub name: String,
    /// Its snapshot, when it is ready.
    pub snapshot: Option<String>,
    /// `queued booting settling snapshotting ready failed`.
    pub state: String,
    /// What it was made from, JSON.
    pub spec: String,
    /// Why it failed.
    pub error: Option<String>,
    /// When it was asked for, RFC 3339.
    pub created_at: String,
}

impl Db {
    /// Writes a template as it is now.
    pub async fn template_put(&self, row: TemplateRow) -> Result<(), DbError> {
        self.run(move |c| {
            let sql = "INSERT INTO templates (name, snapshot, state, spec, error, created_at)
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                       ON CONFLICT (name) DO UPDATE SET snapshot = ?2, state = ?3, spec = ?4,
                       error = ?5";
            c.prepare_cached(sql)?.execute(params![
                row.name,
                row.snapshot,
                row.state,
                row.spec,
                row.error,
                row.created_at
            ])?;
            Ok(())
        })
        .await
    }

    /// How many VMs of a template to keep parked, if an operator ever said so.
    pub async fn pool_target(&self, template: &str) -> Result<Option<u32>, DbError> {
        let template = template.to_owned();
        self.run(move |c| {
            let mut statement = c.prepare_cached("SELECT target FROM pools WHERE template = ?1")?;
            let mut rows = statement.query([template])?;
            Ok(rows.next()?.map(|row| row.get(0)).transpose()?)
        })
        .await
    }

    /// Remembers an operator's pool target.
    pub async fn set_pool_target(&self, template: &str, target: u32) -> Result<(), DbError> {
        let template = template.to_owned();
        self.run(move |c| {
            let sql = "INSERT INTO pools (template, target) VALUES (?1, ?2)
                       ON CONFLICT (template) DO UPDATE SET target = ?2";
            c.execute(sql, params![template, target])?;
            Ok(())
        })
        .await
    }
}
