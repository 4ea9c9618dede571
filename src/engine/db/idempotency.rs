//! Rows for requests that carry an idempotency key: claimed before the work, completed with the
//! reply after it, forgotten after [`RETENTION`].

use std::time::Duration;

use rusqlite::{OptionalExtension, params};
use time::OffsetDateTime;

use super::{Db, DbError};

/// How long a reply can be replayed.
pub const RETENTION: Duration = Duration::from_secs(24 * 3600);

/// What is known of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// Nothing so far: the request is claimed for whoever asked, and must be done now.
    New,
    /// Another request came with it.
    Other,
    /// The same request is being done.
    UnderWay,
    /// The same request was done.
    Done {
        /// Status code.
        status: u16,
        /// The reply, as it was stored.
        reply: String,
    },
}

impl Db {
    /// Claims a key for a request, or says what is known of it.
    pub async fn idempotency_claim(&self, key: &str, request: &str) -> Result<Known, DbError> {
        let (key, request) = (key.to_owned(), request.to_owned());
        self.run(move |c| {
            let now = OffsetDateTime::now_utc().unix_timestamp();
            let transaction = c.transaction()?;
            let sql = "DELETE FROM idempotency WHERE created_at < ?1 AND status IS NOT NULL";
            transaction
                .prepare_cached(sql)?
                .execute([now.saturating_sub_unsigned(RETENTION.as_secs())])?;
            let sql = "SELECT request, status, reply FROM idempotency WHERE key = ?1";
            let row = transaction.prepare_cached(sql)?.query_row([&key], |row| {
                let (request, status): (String, Option<u16>) = (row.get(0)?, row.get(1)?);
                Ok((request, status, row.get::<_, Option<String>>(2)?))
            });
            let known = match row.optional()? {
                None => {
                    let sql = "INSERT INTO idempotency (key, request, created_at)
                               VALUES (?1, ?2, ?3)";
                    transaction.prepare_cached(sql)?.execute(params![key, request, now])?;
                    Known::New
                }
                Some((was, ..)) if was != request => Known::Other,
                Some((_, Some(status), Some(reply))) => Known::Done { status, reply },
                Some(_) => Known::UnderWay,
            };
            transaction.commit()?;
            Ok(known)
        })
        .await
    }

    /// Keeps the reply to a claimed request.
    pub async fn idempotency_done(
        &self,
        key: &str,
        status: u16,
        reply: String,
    ) -> Result<(), DbError> {
        let key = key.to_owned();
        self.run(move |c| {
            let sql = "UPDATE idempotency SET status = ?2, reply = ?3 WHERE key = ?1";
            c.prepare_cached(sql)?.execute(params![key, status, reply])?;
            Ok(())
        })
        .await
    }

    /// Gives a key back: its request made and changed nothing.
    pub async fn idempotency_release(&self, key: &str) -> Result<(), DbError> {
        let key = key.to_owned();
        self.run(move |c| {
            let sql = "DELETE FROM idempotency WHERE key = ?1 AND status IS NULL";
            c.prepare_cached(sql)?.execute([key])?;
            Ok(())
        })
        .await
    }

    /// Keys of requests that an earlier service did not finish; they are given back.
    pub async fn idempotency_interrupted(&self) -> Result<Vec<String>, DbError> {
        self.run(|c| {
            let sql = "DELETE FROM idempotency WHERE status IS NULL RETURNING key";
            let mut statement = c.prepare(sql)?;
            let keys = statement.query_map([], |row| row.get(0))?;
            Ok(keys.collect::<Result<_, _>>()?)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_is_claimed_once_and_then_tells_what_became_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.db");
        let db = Db::open(&path).unwrap();
        let claim = async |db: &Db, request| db.idempotency_claim("k", request).await.unwrap();
        assert_eq!(claim(&db, "a").await, Known::New);
        assert_eq!(claim(&db, "a").await, Known::UnderWay);
        assert_eq!(claim(&db, "b").await, Known::Other);
        db.idempotency_release("k").await.unwrap();
        assert_eq!(claim(&db, "b").await, Known::New);
        db.idempotency_done("k", 201, "reply".to_owned()).await.unwrap();
        db.idempotency_release("k").await.unwrap();
        let done = Known::Done { status: 201, reply: "reply".to_owned() };
        // Also for the next service.
        drop(db);
        let db = Db::open(&path).unwrap();
        assert_eq!(claim(&db, "b").await, done);
        assert_eq!(claim(&db, "a").await, Known::Other);
        assert_eq!(db.idempotency_interrupted().await.unwrap(), Vec::<String>::new());
        assert_eq!(db.idempotency_claim("half", "a").await.unwrap(), Known::New);
        drop(db);
        let db = Db::open(&path).unwrap();
        assert_eq!(db.idempotency_interrupted().await.unwrap(), ["half"]);
        assert_eq!(db.idempotency_claim("half", "a").await.unwrap(), Known::New);
        // Its time is over.
        let old = OffsetDateTime::now_utc().unix_timestamp() - RETENTION.as_secs() as i64 - 1;
        db.run(move |c| Ok(c.execute("UPDATE idempotency SET created_at = ?1", [old])?))
            .await
            .unwrap();
        assert_eq!(claim(&db, "a").await, Known::New);
    }
}
