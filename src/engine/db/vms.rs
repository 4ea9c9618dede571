//! Rows for VMs.

use rusqlite::{Row, params};
use serde::Serialize;
use serde::de::DeserializeOwned;
use snapshotter::vmm::VmRecord;

use super::{Db, DbError};
use crate::engine::identity::{Identity, ItemView};
use crate::engine::lifecycle::Timings;
use crate::engine::sandbox::SandboxData;

/// How far a VM has come, as the database knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// A process may exist; nobody was promised this VM.
    Starting,
    /// Identity proven, waiting in the pool.
    Parked,
    /// Somebody's sandbox.
    Claimed,
    /// Somebody's sandbox, on disk.
    Paused,
}

impl Stage {
    fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Parked => "parked",
            Self::Claimed => "claimed",
            Self::Paused => "paused",
        }
    }

    fn parse(text: &str) -> Self {
        match text {
            "parked" => Self::Parked,
            "claimed" => Self::Claimed,
            "paused" => Self::Paused,
            // Unknown means not promised to anyone.
            _ => Self::Starting,
        }
    }
}

/// Identity as stored: the values and what the guest reported.
#[derive(Debug, Clone, Serialize, serde::Deserialize)]
pub struct StoredIdentity {
    /// The values.
    pub values: Identity,
    /// The report.
    pub items: Vec<ItemView>,
}

/// One VM.
#[derive(Debug, Clone)]
pub struct VmRow {
    /// Its id, the sandbox's too.
    pub id: String,
    /// How far it has come.
    pub stage: Stage,
    /// Its process, if it had one.
    pub record: Option<VmRecord>,
    /// Identity values and report.
    pub identity: Option<StoredIdentity>,
    /// The sandbox.
    pub sandbox: Option<SandboxData>,
}

fn json<T: Serialize>(what: &'static str, value: &T) -> Result<String, DbError> {
    serde_json::to_string(value).map_err(|source| DbError::Malformed { what, source })
}

fn parse<T: DeserializeOwned>(
    what: &'static str,
    text: Option<String>,
) -> Result<Option<T>, DbError> {
    text.map(|t| serde_json::from_str(&t))
        .transpose()
        .map_err(|source| DbError::Malformed { what, source })
}

fn now() -> String {
    let format = &time::format_description::well_known::Rfc3339;
    time::OffsetDateTime::now_utc().format(format).unwrap_or_default()
}

impl Db {
    /// Intent: a VM is about to be spawned.
    pub async fn vm_starting(
        &self,
        id: &str,
        template: &str,
        snapshot: &str,
    ) -> Result<(), DbError> {
        let (id, template, snapshot) = (id.to_owned(), template.to_owned(), snapshot.to_owned());
        self.run(move |c| {
            let sql = "INSERT INTO vms (id, template, snapshot, stage, created_at)
                       VALUES (?1, ?2, ?3, 'starting', ?4)";
            c.prepare_cached(sql)?.execute(params![id, template, snapshot, now()])?;
            Ok(())
        })
        .await
    }

    /// The VM's process and the identity it is about to be given; refused when any other VM, live
    /// or paused, has a part of it.
    pub async fn vm_spawned(&self, record: &VmRecord, identity: &Identity) -> Result<(), DbError> {
        let (id, record) = (record.id.clone(), json("VM record", record)?);
        let identity = identity.clone();
        self.run(move |c| {
            let sql = "UPDATE vms SET record = ?2, hostname = ?3, machine_id = ?4, mac = ?5,
                       generation = ?6 WHERE id = ?1";
            let i = identity;
            let done = c.prepare_cached(sql)?.execute(params![
                id,
                record,
                i.hostname,
                i.machine_id,
                i.mac,
                i.generation
            ]);
            match done {
                Err(rusqlite::Error::SqliteFailure(e, Some(message)))
                    if e.code == rusqlite::ErrorCode::ConstraintViolation =>
                {
                    let column = message.rsplit('.').next().unwrap_or_default();
                    Err(DbError::NotUnique(column.to_owned()))
                }
                other => other.map(drop).map_err(DbError::from),
            }
        })
        .await
    }

    /// The identity is proven; the VM waits in the pool.
    pub async fn vm_parked(&self, id: &str, identity: &StoredIdentity) -> Result<(), DbError> {
        let (id, identity) = (id.to_owned(), json("identity", identity)?);
        self.run(move |c| {
            let sql = "UPDATE vms SET stage = 'parked', identity = ?2 WHERE id = ?1";
            c.prepare_cached(sql)?.execute(params![id, identity])?;
            Ok(())
        })
        .await
    }

    /// The VM is about to be somebody's sandbox.
    pub async fn vm_claimed(
        &self,
        id: &str,
        sandbox: &SandboxData,
        identity: &StoredIdentity,
    ) -> Result<(), DbError> {
        let (id, sandbox) = (id.to_owned(), json("sandbox", sandbox)?);
        let identity = json("identity", identity)?;
        self.run(move |c| {
            let sql = "UPDATE vms SET stage = 'claimed', sandbox = ?2, identity = ?3 WHERE id = ?1";
            c.prepare_cached(sql)?.execute(params![id, sandbox, identity])?;
            Ok(())
        })
        .await
    }

    /// How long it took to make a sandbox.
    pub async fn vm_timings(&self, id: &str, timings: &Timings) -> Result<(), DbError> {
        let (id, timings) = (id.to_owned(), json("timings", timings)?);
        self.run(move |c| {
            let sql = "UPDATE vms SET sandbox = json_set(sandbox, '$.timings_ms', json(?2))
                       WHERE id = ?1 AND sandbox IS NOT NULL";
            c.prepare_cached(sql)?.execute(params![id, timings])?;
            Ok(())
        })
        .await
    }

    /// A sandbox changed.
    pub async fn vm_sandbox(
        &self,
        id: &str,
        stage: Stage,
        sandbox: &SandboxData,
    ) -> Result<(), DbError> {
        let (id, sandbox) = (id.to_owned(), json("sandbox", sandbox)?);
        self.run(move |c| {
            let sql = "UPDATE vms SET stage = ?2, sandbox = ?3 WHERE id = ?1";
            c.prepare_cached(sql)?.execute(params![id, stage.as_str(), sandbox])?;
            Ok(())
        })
        .await
    }

    /// A sandbox is on disk now. Synced before this returns: its VM is about to be killed, and a
    /// machine that fails then must find it again.
    pub async fn vm_paused(&self, id: &str, sandbox: &SandboxData) -> Result<(), DbError> {
        let (id, sandbox) = (id.to_owned(), json("sandbox", sandbox)?);
        self.run(move |c| {
            c.pragma_update(None, "synchronous", "full")?;
            let sql = "UPDATE vms SET stage = 'paused', sandbox = ?2 WHERE id = ?1";
            let done = c.prepare_cached(sql).and_then(|mut s| s.execute(params![id, sandbox]));
            c.pragma_update(None, "synchronous", "normal")?;
            Ok(done.map(drop)?)
        })
        .await
    }

    /// The VM and all it held are gone.
    pub async fn vm_gone(&self, id: &str) -> Result<(), DbError> {
        let id = id.to_owned();
        self.run(move |c| {
            c.prepare_cached("DELETE FROM vms WHERE id = ?1")?.execute([id])?;
            Ok(())
        })
        .await
    }

    /// Every VM the database knows.
    pub async fn vms(&self) -> Result<Vec<VmRow>, DbError> {
        self.run(|c| {
            let sql = "SELECT id, stage, record, identity, sandbox FROM vms";
            let mut statement = c.prepare(sql)?;
            let rows = statement.query_map([], raw_row)?;
            rows.map(|row| row.map_err(DbError::from)?.parse()).collect()
        })
        .await
    }
}

struct RawRow {
    id: String,
    stage: String,
    record: Option<String>,
    identity: Option<String>,
    sandbox: Option<String>,
}

fn raw_row(row: &Row<'_>) -> rusqlite::Result<RawRow> {
    Ok(RawRow {
        id: row.get(0)?,
        stage: row.get(1)?,
        record: row.get(2)?,
        identity: row.get(3)?,
        sandbox: row.get(4)?,
    })
}

impl RawRow {
    fn parse(self) -> Result<VmRow, DbError> {
        Ok(VmRow {
            id: self.id,
            stage: Stage::parse(&self.stage),
            record: parse("VM record", self.record)?,
            identity: parse("identity", self.identity)?,
            sandbox: parse("sandbox", self.sandbox)?,
        })
    }
}
