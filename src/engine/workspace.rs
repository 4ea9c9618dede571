//! Snapshots of users' machines: what a pause and a fork write, and what a resume and a clone are
//! restored from.
//!
//! A workspace snapshot holds only what differs from its template: device state, memory deltas, disk
//! deltas. It carries every delta between the template and itself (as hard links), so that nothing
//! but the template has to outlive it.
//!
//! All of it is encrypted under one key: the sandbox's own for a pause, the snapshot's own for a
//! fork. Deltas below that were written with another key are merged into the new ones instead of
//! linked, so that destroying one key takes just what belongs to it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use snapshotter::delta::{self, DeltaError};
use snapshotter::manifest::{DELTA, DISK_DELTA, FORMAT, FileEntry, Manifest, ManifestError};
use snapshotter::store::{Draft, PublishError};
use snapshotter::vmm::VmmError;
use uffd_handler::seal::Key;
use uffd_handler::source::{LayerFiles, MemoryLayers};

use super::Engine;
use super::budget::{NoRoom, allocated_bytes};
use super::keyring::{Keyring, KeyringError};
use super::lifecycle::{Timings, millis};
use super::machine::Machine;
use super::sandbox::SandboxData;
use super::template::ReadyTemplate;

/// Deltas in a workspace before they are merged into one: each costs every page lookup a search.
const MAX_DELTAS: usize = 8;

/// Why a machine could not be written to disk, or found there again.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// Memory.
    #[error(transparent)]
    Delta(#[from] DeltaError),
    /// Publication.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Its key.
    #[error(transparent)]
    Key(#[from] KeyringError),
    /// The snapshot does not fit or is damaged.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// There is no room for it.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// A file.
    #[error("{what} {path:?}: {source}")]
    File {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
}

pub(super) fn file(
    what: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> WorkspaceError {
    let path = path.to_owned();
    move |source| WorkspaceError::File { what, path, source }
}

/// Waits for work on a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

/// What a workspace is encrypted with.
#[derive(Debug, Clone)]
pub(super) struct WriteKey {
    pub(super) name: String,
    key: Key,
}

impl Engine {
    /// A new key of that name; `None` when nothing is to be encrypted.
    pub(super) async fn new_key(&self, name: &str) -> Result<Option<WriteKey>, WorkspaceError> {
        if !self.config.encrypt_workspaces {
            return Ok(None);
        }
        let (keys, name) = (Arc::clone(&self.context.keys), name.to_owned());
        let made = move || keys.create(&name).map(|key| Some(WriteKey { name, key }));
        Ok(blocking(made).await?)
    }

    /// A sandbox's key: what it has written must open with the same one.
    pub(super) async fn key_of(
        &self,
        data: &SandboxData,
    ) -> Result<Option<WriteKey>, WorkspaceError> {
        let Some(name) = data.key.clone().filter(|_| self.config.encrypt_workspaces) else {
            return self.new_key(&data.id).await;
        };
        let keys = Arc::clone(&self.context.keys);
        let found = move || keys.unwrap(&name).map(|key| Some(WriteKey { name, key }));
        Ok(blocking(found).await?)
    }

    /// Writes a paused VM into a draft of this id: state, memory delta, disk delta.
    pub(super) async fn write_workspace(
        &self,
        machine: &Machine,
        id: String,
        (base, source): (&ReadyTemplate, &ReadyTemplate),
        key: Option<WriteKey>,
        timings: &mut Timings,
    ) -> Result<(Draft, Manifest), WorkspaceError> {
        let draft =
            self.store.draft(&id).map_err(file("cannot make", self.store.dir(&id).as_path()))?;
        let disk = self.write_disk(machine, base, source, draft.dir(), key.clone());
        let cipher = key.as_ref().map(|k| &k.key);
        let state =
            async { Ok::<_, WorkspaceError>(machine.vm.snapshot(draft.dir(), cipher).await?) };
        // Both take a processor for as long as they last; neither is given up half-way.
        let (written, disk) = tokio::join!(state, disk);
        let (written, (disk_digest, disk_time)) = (written?, disk?);
        for (phase, took) in written.phases {
            timings.insert(phase.to_owned(), millis(took));
        }
        timings.insert("disk".to_owned(), millis(disk_time));
        let since = Instant::now();
        let mut stack = Stack {
            keys: Arc::clone(&self.context.keys),
            key,
            linked: source.manifest.files.clone(),
            draft,
        };
        let digests = [(DELTA, written.delta_digest), (DISK_DELTA, Some(disk_digest))];
        for (name, digest) in digests {
            if let Some(digest) = digest {
                stack.note(name, digest)?;
            }
        }
        let memory = (base.memory.layers.clone(), source.own_layers(base), base.size.memory_bytes);
        let disk = (base.disk_chain(), source.own_disk_deltas(base), source.disk_bytes()?);
        let stacked = blocking(move || {
            let memory = stack.up(DELTA, memory)?;
            let disk = stack.up(DISK_DELTA, disk)?;
            Ok::<_, WorkspaceError>((memory, disk, stack))
        });
        let (memory_layers, disk_layers, Stack { draft, key, .. }) = stacked.await?;
        timings.insert("stack".to_owned(), millis(since.elapsed()));
        let manifest = Manifest {
            format: FORMAT,
            id,
            created_at: time::OffsetDateTime::now_utc(),
            parent: Some(base.snapshot.clone()),
            size: base.size,
            compat: self.driver().compat().clone(),
            image: base.manifest.image.clone(),
            image_digests: base.manifest.image_digests.clone(),
            files: Default::default(),
            memory_layers,
            disk_layers,
            key: key.map(|k| k.name),
            template: false,
            env: base.manifest.env.clone(),
            boot: None,
            frozen_identity: Default::default(),
        };
        Ok((draft, manifest))
    }

    /// Writes what changed on the disk since `source`; gives the digest and the time it took.
    async fn write_disk(
        &self,
        machine: &Machine,
        base: &ReadyTemplate,
        source: &ReadyTemplate,
        into: &Path,
        key: Option<WriteKey>,
    ) -> Result<([u8; 32], Duration), WorkspaceError> {
        let since = Instant::now();
        let (disk, data) = (machine.dir().scratch(), into.join(DISK_DELTA));
        let (flat, keys) = (base.scratch.clone(), Arc::clone(&self.context.keys));
        let mut below = base.disk_chain();
        below.extend(source.own_disk_deltas(base));
        let bytes = source.disk_bytes()?;
        let work = move || {
            let disk = File::open(&disk).map_err(file("cannot read", &disk))?;
            let flat = File::open(&flat).map_err(file("cannot read", &flat))?;
            let below = MemoryLayers::open_with(&below, bytes, &*keys).map_err(DeltaError::from)?;
            let key = key.as_ref().map(|k| &k.key);
            Ok(delta::write_disk(&disk, &flat, &below, &data, key)?.digest)
        };
        blocking(work).await.map(|digest| (digest, since.elapsed()))
    }

    /// Publishes a draft on a thread that may block.
    pub(super) async fn publish(
        &self,
        draft: Draft,
        manifest: Manifest,
    ) -> Result<Manifest, WorkspaceError> {
        self.require_room(allocated_bytes(draft.dir(), &mut HashSet::new()))?;
        let store = self.store.clone();
        Ok(blocking(move || store.publish(draft, manifest)).await?)
    }

    /// What to restore a snapshot with, a workspace's or a template's. What it stands on is what its
    /// manifest says, whatever the template's name stands for by now.
    pub(super) fn resolve_workspace(
        &self,
        template: &str,
        snapshot: &str,
    ) -> Result<ReadyTemplate, WorkspaceError> {
        let (store, here) = (&self.store, self.driver().compat());
        let images = self.config.home.join("images");
        Ok(ReadyTemplate::resolve(template, store, &images, here, snapshot)?)
    }

    /// Removes a snapshot that no template and no sandbox needs any more. On a busy disk that takes
    /// as long as half a second.
    pub(super) async fn drop_workspace(&self, snapshot: &str) {
        let template =
            self.templates().iter().any(|t| t.ready().is_some_and(|r| r.snapshot == snapshot));
        let needed = template
            || self.sandboxes().iter().any(|s| {
                let data = s.data();
                data.restored_from == snapshot || data.paused_in.as_deref() == Some(snapshot)
            });
        if needed || self.is_pinned(snapshot) {
            return;
        }
        // A template's stays, also while its template is not known yet: sandboxes end in the first
        // moments of a service, too.
        let Some(manifest) = self.store.manifest(snapshot).ok().filter(|m| !m.is_template()) else {
            return;
        };
        // A fork's: the key goes first, and with it what the files hold.
        if manifest.key.as_deref() == Some(snapshot) {
            self.destroy_key(snapshot).await;
        }
        self.remove_stored(snapshot).await;
    }

    /// Removes a snapshot's files.
    pub(super) async fn remove_stored(&self, snapshot: &str) {
        let (store, id) = (self.store.clone(), snapshot.to_owned());
        if let Err(e) = blocking(move || store.remove(&id)).await {
            tracing::warn!(snapshot, "cannot remove: {e}");
        }
    }

    /// Destroys a key; what it opened is noise from then on.
    pub(super) async fn destroy_key(&self, name: &str) {
        let (keys, id) = (Arc::clone(&self.context.keys), name.to_owned());
        if let Err(e) = blocking(move || keys.destroy(&id)).await {
            tracing::error!(key = name, "not destroyed: {e}");
        }
    }

    /// Removes the workspaces and the keys that nobody refers to: a service killed between writing
    /// one and noting it leaves just that.
    pub(super) async fn drop_orphans(&self) {
        let snapshots = match self.store.list() {
            Ok(snapshots) => snapshots,
            Err(e) => return tracing::warn!("cannot list snapshots: {e}"),
        };
        for id in &snapshots {
            self.drop_workspace(id).await;
        }
        let sandboxes = self.sandboxes();
        let keys = self.context.keys.ids().unwrap_or_else(|e| {
            tracing::warn!("cannot list keys: {e}");
            Vec::new()
        });
        for key in keys {
            let wanted = sandboxes.iter().any(|s| s.data().key.as_deref() == Some(&key));
            if !wanted && !self.store.dir(&key).exists() {
                self.destroy_key(&key).await;
            }
        }
    }

    /// Keeps a snapshot for as long as the result lives, whoever refers to it.
    pub(super) fn pin(&self, snapshot: &str) -> Pin<'_> {
        self.hold(snapshot);
        Pin { pinned: &self.pinned, snapshot: snapshot.to_owned() }
    }

    /// The same until [`release`].
    pub(super) fn hold(&self, snapshot: &str) {
        *lock(&self.pinned).entry(snapshot.to_owned()).or_default() += 1;
    }

    /// Whether somebody holds it.
    pub(super) fn is_pinned(&self, snapshot: &str) -> bool {
        lock(&self.pinned).contains_key(snapshot)
    }

    /// The template's snapshot that a sandbox's machine stands on, and what it was restored from.
    pub(super) fn source_of(
        &self,
        template: &str,
        snapshot: &str,
    ) -> Result<(Arc<ReadyTemplate>, ReadyTemplate), WorkspaceError> {
        let source = self.resolve_workspace(template, snapshot)?;
        let base = match &source.manifest.parent {
            Some(parent) if !source.manifest.is_template() => {
                self.resolve_workspace(template, parent)?
            }
            _ => source.clone(),
        };
        Ok((Arc::new(base), source))
    }
}

/// Holds a snapshot.
#[derive(Debug)]
pub(super) struct Pin<'a> {
    pinned: &'a Mutex<HashMap<String, u32>>,
    snapshot: String,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        release(self.pinned, &self.snapshot);
    }
}

/// One holds it less.
pub(super) fn release(pinned: &Mutex<HashMap<String, u32>>, snapshot: &str) {
    let mut pinned = lock(pinned);
    if let Some(count) = pinned.get_mut(snapshot) {
        *count -= 1;
        if *count == 0 {
            pinned.remove(snapshot);
        }
    }
}

pub(super) fn lock(
    pinned: &Mutex<HashMap<String, u32>>,
) -> std::sync::MutexGuard<'_, HashMap<String, u32>> {
    pinned.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The deltas of a draft and those that they stand on.
struct Stack {
    keys: Arc<Keyring>,
    key: Option<WriteKey>,
    draft: Draft,
    /// Entries of the files that are linked.
    linked: BTreeMap<String, FileEntry>,
}

/// The chain of the template, what the source has above it, and the size of all.
type Below = (Vec<LayerFiles>, Vec<LayerFiles>, u64);

impl Stack {
    /// Puts the deltas that the new one called `top` stands on beside it, or merges them all when
    /// they are many or another's. Returns their names, bottom first.
    fn up(&mut self, top: &str, (base, own, bytes): Below) -> Result<Vec<String>, WorkspaceError> {
        let name = self.key.as_ref().map(|k| k.name.as_str());
        let foreign = own.iter().any(|layer| layer.key() != name);
        if foreign || own.len() + 1 >= MAX_DELTAS {
            return self.merge(top, &base, own, bytes);
        }
        let mut names = Vec::new();
        for (number, layer) in own.iter().enumerate() {
            let name = format!("{top}.{number}");
            let target = self.draft.dir().join(&name);
            for (from, to) in layer.paths().iter().zip([target.clone(), delta::index_of(&target)]) {
                std::fs::hard_link(from, &to).map_err(file("cannot link", from))?;
                let known = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
                if let (Some(was), Some(is)) = (known(from), known(&to))
                    && let Some(entry) = self.linked.get(&was)
                {
                    self.draft.note(&is, entry.clone());
                }
            }
            names.push(name);
        }
        names.push(top.to_owned());
        Ok(names)
    }

    fn merge(
        &mut self,
        top: &str,
        base: &[LayerFiles],
        mut deltas: Vec<LayerFiles>,
        bytes: u64,
    ) -> Result<Vec<String>, WorkspaceError> {
        let data = self.draft.dir().join(top);
        let key = self.key.as_ref();
        deltas.push(delta::layer(&data, key.map(|k| k.name.as_str())));
        let merged = self.draft.dir().join("merged");
        let key = key.map(|k| &k.key);
        let summary = delta::merge(base, &deltas, bytes, &merged, &*self.keys, key)?;
        for (from, to) in
            [(merged.clone(), data.clone()), (delta::index_of(&merged), delta::index_of(&data))]
        {
            std::fs::rename(&from, &to).map_err(file("cannot rename", &from))?;
        }
        self.note(top, summary.digest)?;
        Ok(vec![top.to_owned()])
    }

    /// Notes the digest of a delta that was just written.
    fn note(&mut self, name: &str, digest: [u8; 32]) -> Result<(), WorkspaceError> {
        let path = self.draft.dir().join(name);
        let meta = path.metadata().map_err(file("cannot look at", &path))?;
        let entry = FileEntry {
            digest: hex::encode(digest),
            bytes: meta.len(),
            allocated_bytes: meta.blocks() * 512,
        };
        self.draft.note(name, entry);
        Ok(())
    }
}

impl ReadyTemplate {
    /// The layers that this source has above `base`.
    pub(super) fn own_layers(&self, base: &ReadyTemplate) -> Vec<LayerFiles> {
        self.memory.layers[base.memory.layers.len()..].to_vec()
    }

    /// Its disk as a chain of layers.
    pub(super) fn disk_chain(&self) -> Vec<LayerFiles> {
        let flat = LayerFiles::Flat { memory: self.scratch.clone(), zero_map: None };
        std::iter::once(flat).chain(self.disk_deltas.iter().cloned()).collect()
    }

    /// The disk deltas that this source has above `base`.
    fn own_disk_deltas(&self, base: &ReadyTemplate) -> Vec<LayerFiles> {
        // One that has a whole disk of its own has none.
        let above = if self.scratch == base.scratch { base.disk_deltas.len() } else { usize::MAX };
        self.disk_deltas.get(above..).unwrap_or_default().to_vec()
    }

    pub(super) fn disk_bytes(&self) -> Result<u64, WorkspaceError> {
        let meta = self.scratch.metadata().map_err(file("cannot look at", &self.scratch))?;
        Ok(meta.len())
    }
}
