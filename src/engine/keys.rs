//! API keys: who may ask, for what, and for how much.
//!
//! A key is kept as its digest. What belongs to it while the service runs, what it has set aside and
//! how fast it claims, is its [`Account`]; [`super::quota`] decides on it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use dashmap::DashMap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::db::{Db, DbError};
use super::ids;
use super::quota::{Bucket, Size};

/// Name of the key in the key file, which is not in the database and cannot be removed.
pub const FILE_KEY: &str = "api-key";

/// Something a key may do. Every key may look at templates, pools and the service itself.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    ToSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Scope {
    /// Everything, keys included
    Admin,
    /// Make sandboxes and use those that it made
    Sandboxes,
    /// Use the sandboxes of every key
    AllSandboxes,
    /// Make and remove templates
    Templates,
    /// Set how many VMs wait
    Pools,
}

impl Scope {
    /// Its name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Sandboxes => "sandboxes",
            Self::AllSandboxes => "all_sandboxes",
            Self::Templates => "templates",
            Self::Pools => "pools",
        }
    }
}

/// How much a key may have at a time; no limit where nothing is said
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Quotas {
    /// Sandboxes, paused ones included
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub sandboxes: Option<u32>,
    /// Processors of all sandboxes that are not paused
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub vcpus: Option<u32>,
    /// Memory of all sandboxes that are not paused
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub memory_bytes: Option<u64>,
    /// What the disks of all sandboxes can grow to
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub disk_bytes: Option<u64>,
    /// Sandboxes made in a second; as many at once, if above 1
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, exclusive_minimum = 0.0, maximum = 1_000_000)]
    pub claims_per_second: Option<f64>,
}

/// A key, without the key itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Key {
    /// Its id.
    pub id: String,
    /// What people call it.
    pub name: String,
    /// What it may do.
    pub scopes: BTreeSet<Scope>,
    /// How much it may have.
    pub quotas: Quotas,
    /// When it was made.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

impl Key {
    /// Whether it may do this.
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.contains(&Scope::Admin) || self.scopes.contains(&scope)
    }

    /// Whether it may use a sandbox that belongs to the key `owner`; one that belongs to none was
    /// made before there were several keys.
    pub fn may_use(&self, owner: Option<&str>) -> bool {
        self.may(Scope::AllSandboxes) || owner == Some(&self.id)
    }
}

/// A key in use.
#[derive(Debug)]
pub struct Account {
    /// The key.
    pub key: Key,
    // Std locks: held for a sum, never across an await.
    pub(super) reserved: Mutex<Size>,
    pub(super) bucket: Mutex<Bucket>,
}

impl Account {
    /// A key that nobody uses yet.
    pub fn new(key: Key) -> Self {
        let bucket = Bucket::full(key.quotas.claims_per_second);
        Self { key, reserved: Mutex::new(Size::default()), bucket: Mutex::new(bucket) }
    }

    /// One that may do everything: the holder of the key file, or, as far as limits go, the service
    /// as a whole.
    pub fn all_powerful(name: &str, quotas: Quotas) -> Self {
        Self::new(Key {
            id: name.to_owned(),
            name: name.to_owned(),
            scopes: BTreeSet::from([Scope::Admin]),
            quotas,
            created_at: OffsetDateTime::now_utc(),
        })
    }
}

/// Digest of a key or token.
pub fn digest(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

/// Why a key was not made or removed.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The name is in use.
    #[error("name: a key {0:?} exists already")]
    NameTaken(String),
    /// No such key.
    #[error("no key {0:?}; GET /v1/keys lists them")]
    NotFound(String),
    /// The state database.
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Every key the service knows.
#[derive(Debug)]
pub struct Keys {
    db: Db,
    // By digest: comparing digests says nothing about the key in the time it takes.
    by_digest: DashMap<[u8; 32], Arc<Account>>,
    by_id: DashMap<String, Arc<Account>>,
}

impl Keys {
    /// Those in the database.
    pub(super) async fn load(db: Db) -> Result<Self, DbError> {
        let keys = Self { db, by_digest: DashMap::new(), by_id: DashMap::new() };
        for (digest, key) in keys.db.keys().await? {
            keys.insert(digest, Account::new(key));
        }
        Ok(keys)
    }

    fn insert(&self, digest: [u8; 32], account: Account) {
        let account = Arc::new(account);
        self.by_id.insert(account.key.id.clone(), Arc::clone(&account));
        self.by_digest.insert(digest, account);
    }

    /// Takes the key of the key file in.
    pub fn insert_file_key(&self, secret: &str) {
        self.insert(digest(secret), Account::all_powerful(FILE_KEY, Quotas::default()));
    }

    /// Whose key this is.
    pub fn find(&self, secret: &str) -> Option<Arc<Account>> {
        self.by_digest.get(&digest(secret)).map(|a| Arc::clone(a.value()))
    }

    /// A key by its id.
    pub fn account(&self, id: &str) -> Option<Arc<Account>> {
        self.by_id.get(id).map(|a| Arc::clone(a.value()))
    }

    /// All but that of the key file, by age.
    pub fn list(&self) -> Vec<Key> {
        let all = self.by_id.iter().filter(|a| a.key() != FILE_KEY);
        let mut all: Vec<Key> = all.map(|a| a.key.clone()).collect();
        all.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        all
    }

    /// Makes a key and returns it with its secret, which is not kept.
    pub async fn create(
        &self,
        name: String,
        scopes: BTreeSet<Scope>,
        quotas: Quotas,
    ) -> Result<(Key, String), KeyError> {
        let secret = ids::new_secret("rtw");
        let created_at = OffsetDateTime::now_utc();
        let key = Key { id: ids::new_id(), name, scopes, quotas, created_at };
        if key.name == FILE_KEY || !self.db.key_put(digest(&secret), &key).await? {
            return Err(KeyError::NameTaken(key.name));
        }
        self.insert(digest(&secret), Account::new(key.clone()));
        Ok((key, secret))
    }

    /// Removes a key; what it made stays.
    pub async fn remove(&self, id: &str) -> Result<(), KeyError> {
        if id == FILE_KEY || !self.by_id.contains_key(id) {
            return Err(KeyError::NotFound(id.to_owned()));
        }
        self.db.key_gone(id).await?;
        self.by_id.remove(id);
        self.by_digest.retain(|_, account| account.key.id != id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(scopes: &[Scope]) -> Key {
        let mut key = Account::all_powerful("k", Quotas::default()).key;
        key.scopes = scopes.iter().copied().collect();
        key
    }

    #[test]
    fn a_key_sees_its_own_sandboxes_and_no_others() {
        let own = key(&[Scope::Sandboxes]);
        assert!(own.may_use(Some("k")));
        assert!(!own.may_use(Some("other")) && !own.may_use(None));
        for scope in [Scope::AllSandboxes, Scope::Admin] {
            assert!(key(&[scope]).may_use(Some("other")) && key(&[scope]).may_use(None));
        }
    }

    #[tokio::test]
    async fn keys_outlive_the_service_but_not_their_removal() {
        let dir = tempfile::tempdir().unwrap();
        let db = || Db::open(&dir.path().join("state.db")).unwrap();
        let keys = Keys::load(db()).await.unwrap();
        let quotas = Quotas { sandboxes: Some(2), ..Quotas::default() };
        let scopes = BTreeSet::from([Scope::Sandboxes]);
        let made = keys.create("ci".into(), scopes.clone(), quotas.clone()).await;
        let (key, secret) = made.unwrap();
        let again = keys.create("ci".into(), scopes, Quotas::default()).await;
        assert!(matches!(again, Err(KeyError::NameTaken(_))));
        drop(keys);

        let keys = Keys::load(db()).await.unwrap();
        assert_eq!(keys.find(&secret).unwrap().key, key);
        assert_eq!(keys.list(), std::slice::from_ref(&key));
        assert!(keys.find(&format!("{secret}0")).is_none());
        keys.remove(&key.id).await.unwrap();
        assert!(keys.find(&secret).is_none());
        assert!(matches!(keys.remove(&key.id).await, Err(KeyError::NotFound(_))));
        assert!(Keys::load(db()).await.unwrap().list().is_empty());
    }
}
