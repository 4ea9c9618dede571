//! The keys of workspaces: made here, kept wrapped, destroyed first when a workspace goes.
//!
//! ```text
//! master key file (0600) or a command --wraps--> <home>/keys/<id> --unwraps--> memory
//!                                                                    |
//!                        page server <--descriptor-- supervisor <----+
//! ```
//!
//! A key is in memory while its workspace runs, and is forgotten when it is paused. Its file is
//! overwritten and synced before it is removed: what was encrypted with it is noise from then on.

mod wrap;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use dashmap::DashMap;
use snapshotter::store::sync_dir;
use uffd_handler::seal::{Key, KeySource, SealError};

pub use wrap::{MasterKey, WrapError};

/// Why a key is not kept, or not there.
#[derive(Debug, thiserror::Error)]
pub enum KeyringError {
    /// It could not be made.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// Wrapping or unwrapping it failed.
    #[error("key of {id}: {source}")]
    Wrap {
        /// Its name.
        id: String,
        /// What happened.
        source: WrapError,
    },
    /// Its file.
    #[error("{what} {path:?}: {source}")]
    File {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyringError {
    let path = path.to_owned();
    move |source| KeyringError::File { what, path, source }
}

/// The keys of one home.
#[derive(Debug)]
pub struct Keyring {
    dir: PathBuf,
    master: MasterKey,
    unwrapped: DashMap<String, Key>,
}

impl Keyring {
    /// Opens the keys below `home`.
    pub fn open(home: &Path, master: MasterKey) -> Result<Self, KeyringError> {
        let dir = home.join("keys");
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(file("cannot make", &dir))?;
        Ok(Self { dir, master, unwrapped: DashMap::new() })
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    /// Makes the key of that name, in place of one that nothing was written with. Blocks.
    pub fn create(&self, id: &str) -> Result<Key, KeyringError> {
        let key = Key::generate()?;
        let wrapped = self.master.wrap(id, &key);
        let wrapped = wrapped.map_err(|source| KeyringError::Wrap { id: id.to_owned(), source })?;
        let path = self.path(id);
        let draft = self.dir.join(format!(".{id}"));
        let write = || {
            let mut options = File::options();
            let mut out =
                options.write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
            out.write_all(&wrapped)?;
            out.sync_all()?;
            std::fs::rename(&draft, &path)?;
            sync_dir(&self.dir)
        };
        write().map_err(file("cannot write", &path))?;
        self.unwrapped.insert(id.to_owned(), key.clone());
        Ok(key)
    }

    /// The key of that name. Blocks while it is being unwrapped.
    pub fn unwrap(&self, id: &str) -> Result<Key, KeyringError> {
        if let Some(key) = self.unwrapped.get(id) {
            return Ok(key.value().clone());
        }
        let path = self.path(id);
        let wrapped = std::fs::read(&path).map_err(file("cannot read", &path))?;
        let key = self.master.unwrap(id, &wrapped);
        let key = key.map_err(|source| KeyringError::Wrap { id: id.to_owned(), source })?;
        self.unwrapped.insert(id.to_owned(), key.clone());
        Ok(key)
    }

    /// Whether there is one of that name.
    pub fn exists(&self, id: &str) -> bool {
        self.path(id).exists()
    }

    /// Drops a key from memory; it can be unwrapped again.
    pub fn forget(&self, id: &str) {
        self.unwrapped.remove(id);
    }

    /// Destroys a key for good; one that is not there is fine.
    pub fn destroy(&self, id: &str) -> Result<(), KeyringError> {
        self.unwrapped.remove(id);
        let path = self.path(id);
        let overwrite = || {
            let mut out = File::options().write(true).open(&path)?;
            let length = out.metadata()?.len();
            out.write_all(&vec![0; length as usize])?;
            out.sync_all()?;
            std::fs::remove_file(&path)?;
            sync_dir(&self.dir)
        };
        match overwrite() {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(file("cannot destroy", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Names of all keys.
    pub fn ids(&self) -> io::Result<Vec<String>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            ids.push(entry?.file_name().to_string_lossy().into_owned());
        }
        Ok(ids)
    }
}

impl KeySource for Keyring {
    fn key(&self, id: &str) -> Result<Key, SealError> {
        self.unwrap(id).map_err(|e| SealError::Missing { id: id.to_owned(), reason: e.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn keyring(home: &Path) -> Keyring {
        Keyring::open(home, MasterKey::from_file(&home.join("master-key")).unwrap()).unwrap()
    }

    #[test]
    fn a_key_is_kept_wrapped_and_comes_back_from_another_service() {
        let home = tempfile::tempdir().unwrap();
        let key = keyring(home.path()).create("one").unwrap();
        let again = keyring(home.path());
        assert_eq!(again.unwrap("one").unwrap().expose(), key.expose());
        assert_eq!(again.key("one").unwrap().expose(), key.expose());
        for path in [home.path().join("master-key"), home.path().join("keys/one")] {
            let meta = std::fs::metadata(&path).unwrap();
            assert_eq!(meta.permissions().mode() & 0o777, 0o600, "{path:?}");
            let stored = std::fs::read(&path).unwrap();
            assert!(!stored.windows(32).any(|w| w == key.expose()), "{path:?}");
        }
        assert_eq!(again.ids().unwrap(), ["one"]);
        // A file under another name is not that key.
        std::fs::copy(home.path().join("keys/one"), home.path().join("keys/two")).unwrap();
        assert!(again.key("two").is_err());
    }

    #[test]
    fn a_destroyed_key_is_gone_for_good() {
        let home = tempfile::tempdir().unwrap();
        let keys = keyring(home.path());
        let old = keys.create("one").unwrap();
        keys.forget("one");
        assert_eq!(keys.key("one").unwrap().expose(), old.expose());
        // Another name of the same file shows what the destruction leaves of it.
        std::fs::hard_link(home.path().join("keys/one"), home.path().join("link")).unwrap();
        keys.destroy("one").unwrap();
        keys.destroy("one").unwrap();
        assert!(keys.key("one").is_err() && !keys.exists("one"));
        let left = std::fs::read(home.path().join("link")).unwrap();
        assert!(!left.is_empty() && left.iter().all(|b| *b == 0));
        assert_ne!(keys.create("one").unwrap().expose(), old.expose());
    }
}
