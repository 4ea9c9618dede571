//! Garbage: what nothing refers to any more. Deleting removes what it can by itself; what is found
//! here was left by an upgrade, a crash, a build whose inputs are of no more use, or a service that is
//! no more.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::Engine;
use super::budget::allocated_bytes;
use super::build::Spec;
use super::template::{BASE, TemplateState};
use super::workspace::lock;
use crate::net::{NOTES, leftover};

/// A thing that nothing refers to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Garbage {
    /// What it is.
    pub kind: GarbageKind,
    /// Its name.
    pub id: String,
    /// Bytes that go with it.
    pub bytes: u64,
    /// Why it is not needed.
    pub reason: &'static str,
    #[serde(skip)]
    path: PathBuf,
}

/// Kinds of garbage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GarbageKind {
    /// A snapshot.
    Snapshot,
    /// An uploaded archive.
    Input,
    /// A guest image.
    Image,
    /// What a service left of its network on the host.
    Network,
}

/// Why garbage was not collected.
#[derive(Debug, thiserror::Error)]
pub enum GcError {
    /// What is needed is not known yet.
    #[error("base is not ready: what it needs is not known yet")]
    NotReady,
    /// A folder, a file, or what a service left on the host.
    #[error("garbage collection: {0}")]
    File(#[from] std::io::Error),
}

impl Engine {
    /// Finds garbage that is at least this old and, unless it is a dry run, removes it. What just
    /// came may be about to be referred to.
    pub async fn collect_garbage(
        self: &Arc<Self>,
        dry_run: bool,
        age: Duration,
    ) -> Result<Vec<Garbage>, GcError> {
        let _one_at_a_time = self.template_changes.lock().await;
        let base = self.template(BASE).map(|base| base.status().state);
        if base != Some(TemplateState::Ready) {
            return Err(GcError::NotReady);
        }
        let engine = Arc::clone(self);
        let work = move || {
            let found = engine.find_garbage(age)?;
            if !dry_run {
                for garbage in &found {
                    engine.remove_garbage(garbage)?;
                    tracing::info!(id = garbage.id, bytes = garbage.bytes, "{}", garbage.reason);
                }
            }
            Ok(found)
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }

    /// Snapshots that a template, a sandbox or an operation needs, and all they stand on.
    pub(super) fn needed_snapshots(&self) -> HashSet<String> {
        let mut roots: Vec<String> = lock(&self.pinned).keys().cloned().collect();
        let templates = self.templates();
        roots.extend(templates.iter().filter_map(|t| t.ready()).map(|r| r.snapshot.clone()));
        for sandbox in self.sandboxes() {
            let data = sandbox.data();
            roots.push(data.restored_from);
            roots.extend(data.paused_in);
        }
        let mut needed = HashSet::new();
        for root in roots {
            let chain = self.store.chain(&root).unwrap_or_default();
            needed.extend(chain.into_iter().map(|manifest| manifest.id));
            needed.insert(root);
        }
        needed
    }

    fn find_garbage(&self, age: Duration) -> Result<Vec<Garbage>, std::io::Error> {
        let needed = self.needed_snapshots();
        let (mut found, mut images) = (Vec::new(), HashSet::new());
        let old = OffsetDateTime::now_utc() - age;
        let mut seen = HashSet::new();
        // What stays is looked at first: a file that it shares is not freed.
        let (stay, go): (Vec<_>, Vec<_>) = self.store.list()?.into_iter().partition(|id| {
            let manifest = self.store.manifest(id);
            let recent = manifest.as_ref().is_ok_and(|m| m.created_at > old);
            let stays = needed.contains(id) || recent;
            if let (true, Ok(manifest)) = (stays, manifest) {
                images.insert(manifest.image);
            }
            stays
        });
        for id in stay {
            allocated_bytes(&self.store.dir(&id), &mut seen);
        }
        for id in go {
            let path = self.store.dir(&id);
            let bytes = allocated_bytes(&path, &mut seen);
            let reason = "no template and no sandbox stands on it";
            found.push(Garbage { kind: GarbageKind::Snapshot, id, bytes, reason, path });
        }
        self.find_inputs(age, &mut found)?;
        find_images(&self.config.home.join("images"), &images, age, &mut found);
        find_networks(Path::new(NOTES), age, &mut found)?;
        Ok(found)
    }

    fn find_inputs(&self, age: Duration, found: &mut Vec<Garbage>) -> Result<(), std::io::Error> {
        let templates = self.templates();
        let open = templates.iter().filter(|t| !t.status().state.is_final());
        let needed: HashSet<&str> =
            open.filter_map(|t| t.spec.as_ref()).flat_map(Spec::inputs).collect();
        for input in self.inputs.list()? {
            if !needed.contains(input.sha256.as_str()) && is_old(input.since, age) {
                found.push(Garbage {
                    kind: GarbageKind::Input,
                    path: self.inputs.path(&input.sha256),
                    id: input.sha256,
                    bytes: input.bytes,
                    reason: "no build under way copies it",
                });
            }
        }
        Ok(())
    }

    fn remove_garbage(&self, garbage: &Garbage) -> std::io::Result<()> {
        match garbage.kind {
            GarbageKind::Snapshot => self.store.remove(&garbage.id),
            GarbageKind::Input => self.inputs.remove(&garbage.id),
            GarbageKind::Image => std::fs::remove_dir_all(&garbage.path),
            GarbageKind::Network => leftover::remove(&garbage.path),
        }
    }

    /// Removes published layers that no row knows: a service killed while it deleted a template
    /// leaves just that.
    pub(super) fn drop_unknown_layers(&self, known: &HashSet<String>) {
        let mut needed = self.needed_snapshots();
        for id in known {
            needed.extend(self.store.chain(id).unwrap_or_default().into_iter().map(|m| m.id));
        }
        for id in self.store.list().unwrap_or_default() {
            let derived =
                self.store.manifest(&id).is_ok_and(|m| m.is_template() && m.parent.is_some());
            if derived
                && !needed.contains(&id)
                && let Err(e) = self.store.remove(&id)
            {
                tracing::warn!(snapshot = id, "cannot remove: {e}");
            }
        }
    }
}

fn is_old(since: SystemTime, age: Duration) -> bool {
    since.elapsed().is_ok_and(|elapsed| elapsed >= age)
}

/// What other services left of their networks, killed for good.
fn find_networks(
    notes: &Path,
    age: Duration,
    found: &mut Vec<Garbage>,
) -> Result<(), std::io::Error> {
    for left in leftover::find(notes)?.into_iter().filter(|left| is_old(left.since, age)) {
        found.push(Garbage {
            kind: GarbageKind::Network,
            id: left.table,
            bytes: 0,
            reason: "the service that made it and its VMs are no more",
            path: left.note,
        });
    }
    Ok(())
}

/// Guest images that no remaining snapshot boots from. A folder that is a link is shared with other
/// homes, and theirs to clean.
fn find_images(dir: &Path, needed: &HashSet<String>, age: Duration, found: &mut Vec<Garbage>) {
    if dir.is_symlink() {
        return;
    }
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, id) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let description = std::fs::metadata(path.join("image.json"));
        let Ok(since) = description.and_then(|m| m.modified()) else { continue };
        if !needed.contains(&id) && is_old(since, age) {
            let bytes = allocated_bytes(&path, &mut HashSet::new());
            let reason = "no snapshot boots from it";
            found.push(Garbage { kind: GarbageKind::Image, id, bytes, reason, path });
        }
    }
}
