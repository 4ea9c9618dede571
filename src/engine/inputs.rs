//! What builds copy into templates: archives, uploaded ahead and kept by their SHA-256 until no
//! build needs them.
//!
//! ```text
//! <home>/inputs/<sha256>   whole, checked, never written again
//! <home>/tmp/upload-...    on its way; removed at start
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::build::is_sha256;
use super::ids;

/// The folder of inputs.
#[derive(Debug, Clone)]
pub struct Inputs {
    dir: PathBuf,
    tmp: PathBuf,
}

/// One input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// SHA-256 of its contents.
    pub sha256: String,
    /// Its length.
    pub bytes: u64,
    /// When it came.
    pub since: SystemTime,
}

/// Why an input was not kept.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// What came is not what was announced.
    #[error("the body's SHA-256 is {found}, not {wanted}")]
    Digest {
        /// As announced.
        wanted: String,
        /// As computed.
        found: String,
    },
    /// There is no room.
    #[error("it is longer than the {0} bytes left of the disk budget")]
    NoRoom(u64),
    /// It broke off.
    #[error("the body broke off: {0}")]
    Body(String),
    /// It could not be written.
    #[error("cannot keep it: {0}")]
    File(#[from] io::Error),
}

/// Removes an upload that is not kept.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Inputs {
    /// The inputs below `home`.
    pub fn open(home: &Path) -> io::Result<Self> {
        let inputs = Self { dir: home.join("inputs"), tmp: home.join("tmp") };
        std::fs::create_dir_all(&inputs.dir)?;
        Ok(inputs)
    }

    /// Where an input is, or would be. `sha256` is one: see [`is_sha256`].
    pub fn path(&self, sha256: &str) -> PathBuf {
        self.dir.join(sha256)
    }

    /// Whether it is there.
    pub fn has(&self, sha256: &str) -> bool {
        self.path(sha256).is_file()
    }

    /// Keeps what comes if it has this digest and is not longer than `room`.
    pub async fn receive<E: std::fmt::Display>(
        &self,
        sha256: &str,
        room: u64,
        body: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<u64, InputError> {
        let partial = Partial(self.tmp.join(format!("upload-{}", ids::new_id())));
        let mut file = tokio::fs::File::create_new(&partial.0).await?;
        let (mut hash, mut length) = (Sha256::new(), 0_u64);
        let mut body = std::pin::pin!(body);
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|e| InputError::Body(e.to_string()))?;
            length += piece.len() as u64;
            if length > room {
                return Err(InputError::NoRoom(room));
            }
            hash.update(&piece);
            file.write_all(&piece).await?;
        }
        file.sync_all().await?;
        let found = hex::encode(hash.finalize());
        if found != sha256 {
            return Err(InputError::Digest { wanted: sha256.to_owned(), found });
        }
        std::fs::rename(&partial.0, self.path(sha256))?;
        snapshotter::store::sync_dir(&self.dir)?;
        Ok(length)
    }

    /// Keeps bytes that are there; gives their digest.
    pub async fn keep(&self, bytes: Vec<u8>, room: u64) -> Result<String, InputError> {
        let sha256 = hex::encode(Sha256::digest(&bytes));
        if !self.has(&sha256) {
            let body = futures_util::stream::iter([Ok::<_, io::Error>(Bytes::from(bytes))]);
            self.receive(&sha256, room, body).await?;
        }
        Ok(sha256)
    }

    /// All inputs.
    pub fn list(&self) -> io::Result<Vec<Input>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            let sha256 = entry.file_name().to_string_lossy().into_owned();
            if is_sha256(&sha256) {
                let meta = entry.metadata()?;
                found.push(Input { sha256, bytes: meta.len(), since: meta.modified()? });
            }
        }
        found.sort_by(|a, b| a.sha256.cmp(&b.sha256));
        Ok(found)
    }

    /// Removes one.
    pub fn remove(&self, sha256: &str) -> io::Result<()> {
        std::fs::remove_file(self.path(sha256))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_was_announced_is_kept() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("tmp")).unwrap();
        let inputs = Inputs::open(home.path()).unwrap();
        let sha = inputs.keep(b"archive".to_vec(), 100).await.unwrap();
        assert!(inputs.has(&sha) && is_sha256(&sha));
        assert_eq!(std::fs::read(inputs.path(&sha)).unwrap(), b"archive");
        let body = |text: &'static str| {
            futures_util::stream::iter([Ok::<_, io::Error>(Bytes::from_static(text.as_bytes()))])
        };
        let other = "0".repeat(64);
        let wrong = inputs.receive(&other, 100, body("something else")).await;
        assert!(matches!(wrong, Err(InputError::Digest { .. })));
        let long = inputs.receive(&other, 3, body("four")).await;
        assert!(matches!(long, Err(InputError::NoRoom(3))));
        assert_eq!(inputs.list().unwrap().len(), 1);
        assert_eq!(std::fs::read_dir(home.path().join("tmp")).unwrap().count(), 0);
        inputs.remove(&sha).unwrap();
        assert!(!inputs.has(&sha));
    }
}
