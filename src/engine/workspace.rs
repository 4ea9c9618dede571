//! Snapshots of users' machines: what a pause and a fork write, and what a resume and a clone are
//! restored from.
//!
//! A workspace snapshot holds only what differs from its template: device state, memory deltas,
//! the scratch disk. It carries every delta between the template and itself (as hard links), so
//! that nothing but the template has to outlive it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use snapshotter::delta::{self, DeltaError};
use snapshotter::disk;
use snapshotter::manifest::{DELTA, FORMAT, Manifest, ManifestError, SCRATCH, VMSTATE};
use snapshotter::store::{Draft, PublishError};
use snapshotter::vmm::VmmError;
use uffd_handler::source::LayerFiles;

use super::lifecycle::{Machine, Timings, millis};
use super::template::ReadyTemplate;
use super::{Engine, ids};

/// Deltas in a workspace before they are merged into one: each costs every page lookup a search.
const MAX_DELTAS: usize = 4;

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
    /// The snapshot does not fit or is damaged.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
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
    /// Its template is not there, or not yet: after a start it may still be on its way.
    #[error("template {0:?} of the snapshot is not ready")]
    NoTemplate(String),
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> WorkspaceError {
    let path = path.to_owned();
    move |source| WorkspaceError::File { what, path, source }
}

/// What happens to the scratch disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scratch {
    /// The VM ends: the file itself goes into the snapshot.
    Take,
    /// The VM lives on: a copy goes into the snapshot.
    Copy,
}

impl Engine {
    /// Writes a paused VM into a draft: state, memory delta, disk.
    pub(super) async fn write_workspace(
        &self,
        machine: &Machine,
        base: &ReadyTemplate,
        source: &ReadyTemplate,
        scratch: Scratch,
        timings: &mut Timings,
    ) -> Result<(Draft, Manifest), WorkspaceError> {
        let id = ids::new_id();
        let draft =
            self.store.draft(&id).map_err(file("cannot make", self.store.dir(&id).as_path()))?;
        for (phase, took) in machine.vm.snapshot(draft.dir()).await?.phases {
            timings.insert(phase.to_owned(), millis(took));
        }
        let since = Instant::now();
        let disk = machine.dir().scratch();
        let target = draft.dir().join(SCRATCH);
        let copied = match scratch {
            Scratch::Take => std::fs::hard_link(&disk, &target),
            Scratch::Copy => {
                let (from, to) = (disk.clone(), target);
                let work = move || disk::clone_file(&from, &to).map(drop);
                let done = tokio::task::spawn_blocking(work).await;
                done.map_err(std::io::Error::other).and_then(|inner| inner)
            }
        };
        copied.map_err(file("cannot keep", &disk))?;
        timings.insert("disk".to_owned(), millis(since.elapsed()));
        let since = Instant::now();
        let below = source.own_layers(base);
        let (dir, layers) = (draft.dir().to_owned(), base.memory.layers.clone());
        let bytes = base.size.memory_bytes;
        let work = move || stack_deltas(&dir, &layers, &below, bytes);
        let memory_layers = match tokio::task::spawn_blocking(work).await {
            Ok(done) => done?,
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        };
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
            boot: None,
            frozen_identity: Default::default(),
        };
        Ok((draft, manifest))
    }

    /// Publishes a draft on a thread that may block.
    pub(super) async fn publish(
        &self,
        draft: Draft,
        manifest: Manifest,
    ) -> Result<Manifest, WorkspaceError> {
        let store = self.store.clone();
        match tokio::task::spawn_blocking(move || store.publish(draft, manifest)).await {
            Ok(done) => Ok(done?),
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }

    /// What to restore a workspace snapshot with.
    pub(super) fn resolve_workspace(
        &self,
        template: &str,
        snapshot: &str,
    ) -> Result<ReadyTemplate, WorkspaceError> {
        let base = self.template(template).and_then(|t| t.ready());
        let base = base.ok_or_else(|| WorkspaceError::NoTemplate(template.to_owned()))?;
        if snapshot == base.snapshot {
            return Ok(base.as_source());
        }
        let dir = self.store.dir(snapshot);
        let manifest = Manifest::read(&dir)?;
        manifest.check(&dir, self.driver().compat())?;
        Ok(base.with_workspace(&dir, manifest))
    }

    /// Removes a snapshot that no template and no sandbox needs any more.
    pub(super) fn drop_workspace(&self, snapshot: &str) {
        let template =
            self.templates().iter().any(|t| t.ready().is_some_and(|r| r.snapshot == snapshot));
        let needed = template
            || self.sandboxes().iter().any(|s| {
                let data = s.data();
                data.restored_from == snapshot || data.paused_in.as_deref() == Some(snapshot)
            });
        let pinned = lock(&self.pinned).contains(snapshot);
        if needed || pinned {
            return;
        }
        // One that stands on nothing is a template's, also while its template is not known yet:
        // sandboxes end in the first moments of a service, too.
        if !self.store.manifest(snapshot).is_ok_and(|m| m.parent.is_some()) {
            return;
        }
        if let Err(e) = self.store.remove(snapshot) {
            tracing::warn!(snapshot, "cannot remove: {e}");
        }
    }

    /// Removes the workspaces that nobody refers to: a service killed between writing one and noting
    /// it leaves just that.
    pub(super) fn drop_orphans(&self) {
        match self.store.list() {
            Ok(snapshots) => snapshots.iter().for_each(|id| self.drop_workspace(id)),
            Err(e) => tracing::warn!("cannot list snapshots: {e}"),
        }
    }

    /// Keeps a snapshot for as long as the result lives, whoever refers to it.
    pub(super) fn pin(&self, snapshot: &str) -> Pin<'_> {
        lock(&self.pinned).insert(snapshot.to_owned());
        Pin { pinned: &self.pinned, snapshot: snapshot.to_owned() }
    }

    /// What a sandbox's machine was restored from.
    pub(super) fn source_of(
        &self,
        template: &str,
        snapshot: &str,
    ) -> Result<(Arc<ReadyTemplate>, ReadyTemplate), WorkspaceError> {
        let base = self.template(template).and_then(|t| t.ready());
        let base = base.ok_or_else(|| WorkspaceError::NoTemplate(template.to_owned()))?;
        let source = self.resolve_workspace(template, snapshot)?;
        Ok((base, source))
    }
}

/// Holds a snapshot.
#[derive(Debug)]
pub(super) struct Pin<'a> {
    pinned: &'a Mutex<HashSet<String>>,
    snapshot: String,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        lock(self.pinned).remove(&self.snapshot);
    }
}

fn lock(pinned: &Mutex<HashSet<String>>) -> std::sync::MutexGuard<'_, HashSet<String>> {
    pinned.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Puts the deltas that the new one stands on beside it, or merges them all when they are many.
/// Returns their names, bottom first.
fn stack_deltas(
    dir: &Path,
    base: &[LayerFiles],
    below: &[LayerFiles],
    memory_bytes: u64,
) -> Result<Vec<String>, WorkspaceError> {
    let top = dir.join(DELTA);
    if below.len() + 1 >= MAX_DELTAS {
        let mut deltas = below.to_vec();
        deltas.push(delta::layer(&top));
        let merged = dir.join("merged");
        delta::merge(base, &deltas, memory_bytes, &merged)?;
        for (from, to) in
            [(merged.clone(), top.clone()), (delta::index_of(&merged), delta::index_of(&top))]
        {
            std::fs::rename(&from, &to).map_err(file("cannot rename", &from))?;
        }
        return Ok(vec![DELTA.to_owned()]);
    }
    let mut names = Vec::new();
    for (number, layer) in below.iter().enumerate() {
        let LayerFiles::Delta { data, index } = layer else { continue };
        let name = format!("{DELTA}.{number}");
        let target = dir.join(&name);
        std::fs::hard_link(data, &target).map_err(file("cannot link", data))?;
        std::fs::hard_link(index, delta::index_of(&target)).map_err(file("cannot link", index))?;
        names.push(name);
    }
    names.push(DELTA.to_owned());
    Ok(names)
}

impl ReadyTemplate {
    /// The same, as the source of a restore that is not the pool's.
    pub(super) fn as_source(&self) -> ReadyTemplate {
        self.with_workspace_files(self.snapshot.clone(), self.manifest.clone(), None)
    }

    /// A workspace snapshot in `dir` that stands on this template.
    fn with_workspace(&self, dir: &Path, manifest: Manifest) -> ReadyTemplate {
        self.with_workspace_files(manifest.id.clone(), manifest, Some(dir))
    }

    fn with_workspace_files(
        &self,
        snapshot: String,
        manifest: Manifest,
        dir: Option<&Path>,
    ) -> ReadyTemplate {
        let mut memory = self.memory.clone();
        if let Some(dir) = dir {
            memory.layers.extend(manifest.memory_layers.iter().map(|n| delta::layer(&dir.join(n))));
        }
        let in_dir = |name: &str, else_: &Path| dir.map_or(else_.to_owned(), |d| d.join(name));
        ReadyTemplate {
            name: self.name.clone(),
            vmstate: in_dir(VMSTATE, &self.vmstate),
            scratch: in_dir(SCRATCH, &self.scratch),
            memory,
            memory_file: self.memory_file.clone(),
            root_disk: self.root_disk.clone(),
            size: self.size,
            snapshot,
            manifest,
        }
    }

    /// The layers that this source has above `base`.
    fn own_layers(&self, base: &ReadyTemplate) -> Vec<LayerFiles> {
        self.memory.layers[base.memory.layers.len()..].to_vec()
    }
}
