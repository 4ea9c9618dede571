//! The snapshot store: directories that appear whole or not at all, and never change.
//!
//! ```text
//! <home>/snapshots/<id>/manifest.json ...   published
//! <home>/tmp/<id>/...                       being written; removed at start
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::disk;
use crate::manifest::{FileEntry, MANIFEST, MAX_CHAIN, Manifest, ManifestError};

/// The store.
#[derive(Debug, Clone)]
pub struct Store {
    snapshots: PathBuf,
    tmp: PathBuf,
}

/// A snapshot being written. Dropping it without publishing removes it.
#[derive(Debug)]
pub struct Draft {
    id: String,
    dir: PathBuf,
    // Files whose digests were computed as they were written, or long ago.
    known: BTreeMap<String, FileEntry>,
    published: bool,
}

/// Why a snapshot was not published.
#[derive(Debug, thiserror::Error)]
#[error("cannot publish snapshot {id}: {what}: {source}")]
pub struct PublishError {
    id: String,
    what: String,
    source: io::Error,
}

impl Store {
    /// Opens the store below `home`; what a killed service left half-written is removed.
    pub fn open(home: &Path) -> io::Result<Self> {
        let store = Self { snapshots: home.join("snapshots"), tmp: home.join("tmp") };
        std::fs::create_dir_all(&store.snapshots)?;
        match std::fs::remove_dir_all(&store.tmp) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        std::fs::create_dir_all(&store.tmp)?;
        Ok(store)
    }

    /// Directory of a published snapshot.
    pub fn dir(&self, id: &str) -> PathBuf {
        self.snapshots.join(id)
    }

    /// Reads the manifest of a published snapshot.
    pub fn manifest(&self, id: &str) -> Result<Manifest, ManifestError> {
        Manifest::read(&self.dir(id))
    }

    /// The manifests of a snapshot and of all it stands on, bottom first.
    pub fn chain(&self, id: &str) -> Result<Vec<Manifest>, ManifestError> {
        let mut chain = vec![self.manifest(id)?];
        while let Some(parent) = chain.last().and_then(|top| top.parent.clone()) {
            if chain.len() > MAX_CHAIN {
                return Err(ManifestError::Chain { id: id.to_owned() });
            }
            chain.push(self.manifest(&parent)?);
        }
        chain.reverse();
        Ok(chain)
    }

    /// Ids of all published snapshots.
    pub fn list(&self) -> io::Result<Vec<String>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.snapshots)? {
            let entry = entry?;
            if entry.path().join(MANIFEST).is_file() {
                ids.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        ids.sort();
        Ok(ids)
    }

    /// Starts a new snapshot.
    pub fn draft(&self, id: &str) -> io::Result<Draft> {
        let dir = self.tmp.join(id);
        std::fs::create_dir(&dir)?;
        Ok(Draft { id: id.to_owned(), dir, known: BTreeMap::new(), published: false })
    }

    /// Publishes a draft: digests of every file into the manifest, everything synced, then one
    /// rename. A crash at any point leaves either nothing or the whole snapshot.
    pub fn publish(
        &self,
        mut draft: Draft,
        mut manifest: Manifest,
    ) -> Result<Manifest, PublishError> {
        let fail = |what: &str, source| PublishError {
            id: draft.id.clone(),
            what: what.to_owned(),
            source,
        };
        manifest.files.clear();
        let entries = std::fs::read_dir(&draft.dir).map_err(|e| fail("list", e))?;
        for entry in entries {
            let entry = entry.map_err(|e| fail("list", e))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let file = File::open(entry.path()).map_err(|e| fail(&name, e))?;
            file.sync_all().map_err(|e| fail(&name, e))?;
            let described = match draft.known.get(&name) {
                Some(known) => known.clone(),
                None => disk::describe(&entry.path()).map_err(|e| fail(&name, e))?,
            };
            // Not a lock, a reminder: nothing may ever write to a published file.
            let mut mode = file.metadata().map_err(|e| fail(&name, e))?.permissions();
            mode.set_readonly(true);
            file.set_permissions(mode).map_err(|e| fail(&name, e))?;
            manifest.files.insert(name, described);
        }
        let text = serde_json::to_vec_pretty(&manifest).map_err(|e| fail(MANIFEST, e.into()))?;
        write_synced(&draft.dir.join(MANIFEST), &text).map_err(|e| fail(MANIFEST, e))?;
        sync_dir(&draft.dir).map_err(|e| fail("sync", e))?;
        let target = self.dir(&draft.id);
        std::fs::rename(&draft.dir, &target).map_err(|e| fail("rename", e))?;
        sync_dir(&self.snapshots).map_err(|e| fail("sync", e))?;
        draft.published = true;
        Ok(manifest)
    }

    /// Removes a snapshot: it stops being one before its files go.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        let doomed = self.tmp.join(format!("{id}.removed"));
        std::fs::rename(self.dir(id), &doomed)?;
        sync_dir(&self.snapshots)?;
        std::fs::remove_dir_all(&doomed)
    }
}

impl Draft {
    /// Where to write the files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file's entry is known already: it is a link to a published one, or its writer digested it.
    pub fn note(&mut self, name: &str, entry: FileEntry) {
        self.known.insert(name.to_owned(), entry);
    }

    /// The id it will be published under.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// Writes a new file and syncs it.
pub fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()
}

/// Makes a directory's entries durable.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
