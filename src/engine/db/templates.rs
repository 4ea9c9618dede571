//! Rows for templates and pool targets.

use rusqlite::{Row, params};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Db, DbError};

/// One template.
#[derive(Debug, Clone)]
pub struct TemplateRow {
    /// Its name.
    pub name: String,
    /// Its snapshot: when it is ready, or that its build is about to publish.
    pub snapshot: Option<String>,
    /// `queued booting settling snapshotting ready failed`.
    pub state: String,
    /// What it was made from, JSON.
    pub spec: String,
    /// Why it failed.
    pub error: Option<String>,
    /// Which step failed, and how, JSON.
    pub failure: Option<String>,
    /// How often its build was begun.
    pub attempts: u32,
    /// When it was asked for, RFC 3339.
    pub created_at: String,
    /// When it was last used, RFC 3339. Read only; see [`Db::template_used`].
    pub last_used: Option<String>,
}

impl TemplateRow {
    /// When it was last used.
    pub fn last_used(&self) -> Option<OffsetDateTime> {
        OffsetDateTime::parse(self.last_used.as_deref()?, &Rfc3339).ok()
    }
}

fn template(row: &Row<'_>) -> rusqlite::Result<TemplateRow> {
    Ok(TemplateRow {
        name: row.get(0)?,
        snapshot: row.get(1)?,
        state: row.get(2)?,
        spec: row.get(3)?,
        error: row.get(4)?,
        failure: row.get(5)?,
        attempts: row.get(6)?,
        created_at: row.get(7)?,
        last_used: row.get(8)?,
    })
}

impl Db {
    /// Writes a template as it is now.
    pub async fn template_put(&self, row: TemplateRow) -> Result<(), DbError> {
        self.run(move |c| {
            let sql = "INSERT INTO templates
                       (name, snapshot, state, spec, error, failure, attempts, created_at)
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
                       ON CONFLICT (name) DO UPDATE SET snapshot = ?2, state = ?3, spec = ?4,
                       error = ?5, failure = ?6, attempts = ?7, created_at = ?8";
            c.prepare_cached(sql)?.execute(params![
                row.name,
                row.snapshot,
                row.state,
                row.spec,
                row.error,
                row.failure,
                row.attempts,
                row.created_at
            ])?;
            Ok(())
        })
        .await
    }

    /// Every template, in the order in which they were asked for.
    pub async fn templates(&self) -> Result<Vec<TemplateRow>, DbError> {
        self.run(|c| {
            let sql = "SELECT name, snapshot, state, spec, error, failure, attempts, created_at,
                       last_used FROM templates ORDER BY created_at, name";
            let mut statement = c.prepare(sql)?;
            let rows = statement.query_map([], template)?;
            rows.map(|row| row.map_err(DbError::from)).collect()
        })
        .await
    }

    /// A template was used.
    pub async fn template_used(&self, name: &str, at: &str) -> Result<(), DbError> {
        let (name, at) = (name.to_owned(), at.to_owned());
        self.run(move |c| {
            let sql = "UPDATE templates SET last_used = ?2 WHERE name = ?1";
            c.prepare_cached(sql)?.execute([name, at])?;
            Ok(())
        })
        .await
    }

    /// A template is no more, and neither is what was said of its pool.
    pub async fn template_gone(&self, name: &str) -> Result<(), DbError> {
        let name = name.to_owned();
        self.run(move |c| {
            let transaction = c.transaction()?;
            transaction.execute("DELETE FROM templates WHERE name = ?1", [&name])?;
            transaction.execute("DELETE FROM pools WHERE template = ?1", [&name])?;
            Ok(transaction.commit()?)
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
