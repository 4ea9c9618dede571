//! The schema and its versions. A version is never edited once released; a new one is appended.

use rusqlite::Connection;

use super::DbError;

const VERSIONS: &[&str] = &[
    "
    CREATE TABLE templates (
        name        TEXT PRIMARY KEY,
        snapshot    TEXT,
        state       TEXT NOT NULL,
        spec        TEXT NOT NULL,
        error       TEXT,
        created_at  TEXT NOT NULL,
        last_used   TEXT
    ) STRICT;

    -- One row for each VM or paused workspace: from before it is spawned until after it is gone.
    CREATE TABLE vms (
        id          TEXT PRIMARY KEY,
        template    TEXT NOT NULL,
        snapshot    TEXT NOT NULL,
        stage       TEXT NOT NULL,
        -- JSON: snapshotter::vmm::VmRecord, once there is a process.
        record      TEXT,
        -- JSON: the sandbox as its user sees it, once it is claimed.
        sandbox     TEXT,
        -- JSON: identity report, once proven.
        identity    TEXT,
        hostname    TEXT UNIQUE,
        machine_id  TEXT UNIQUE,
        mac         TEXT UNIQUE,
        generation  TEXT UNIQUE,
        created_at  TEXT NOT NULL
    ) STRICT;

    CREATE TABLE pools (
        template    TEXT PRIMARY KEY,
        target      INTEGER NOT NULL
    ) STRICT;

    CREATE TABLE idempotency (
        key         TEXT PRIMARY KEY,
        request     TEXT NOT NULL,
        status      INTEGER,
        reply       TEXT,
        created_at  INTEGER NOT NULL
    ) STRICT;
",
    "
    -- JSON: engine::keys::Key. The key itself is kept as its SHA-256 only.
    CREATE TABLE api_keys (
        id          TEXT PRIMARY KEY,
        name        TEXT NOT NULL UNIQUE,
        digest      BLOB NOT NULL UNIQUE,
        key         TEXT NOT NULL
    ) STRICT;
",
];

/// Applies every version that the database does not have yet, each in one transaction.
pub fn migrate(connection: &mut Connection) -> Result<(), DbError> {
    let have: usize = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    for (number, sql) in VERSIONS.iter().enumerate().skip(have) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(sql)?;
        transaction.pragma_update(None, "user_version", number + 1)?;
        transaction.commit()?;
    }
    Ok(())
}
