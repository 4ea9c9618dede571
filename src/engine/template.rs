//! Templates: what is ready to be restored, and how the first one is made.
//!
//! ```text
//! queued -> booting -> settling -> snapshotting -> ready
//!    |         |           |            |
//!    +---------+-----------+------------+--> failed
//! ```

use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use serde::{Deserialize, Serialize};
use snapshotter::delta;
use snapshotter::manifest::{self, Manifest, ManifestError};
use snapshotter::store::Store;
use snapshotter::vmm::{Compat, MachineSize};
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uffd_handler::source::LayerFiles;
use uffd_handler::supervisor::MemoryPlan;
use utoipa::ToSchema;

use super::build::{BuildLog, Spec};
use crate::live;

/// Name of the template every service has.
pub const BASE: &str = "base";
/// The shared base disk in a guest image's directory.
const ROOT_DISK: &str = "rootfs.img";

/// A template's progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TemplateState {
    /// Waits for its turn.
    Queued,
    /// The VM boots, or is being restored from its parent and runs the build's steps.
    Booting,
    /// Caches written, secrets removed, workload frozen.
    Settling,
    /// Memory and disk are written and tried.
    Snapshotting,
    /// Sandboxes can be made from it.
    Ready,
    /// It could not be made.
    Failed,
}

impl TemplateState {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Queued,
        Self::Booting,
        Self::Settling,
        Self::Snapshotting,
        Self::Ready,
        Self::Failed,
    ];

    /// From its name in the database; what is not known counts as failed.
    pub fn parse(text: &str) -> Self {
        Self::ALL.into_iter().find(|state| state.as_str() == text).unwrap_or(Self::Failed)
    }

    /// Whether nothing more will happen to it.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Ready | Self::Failed)
    }

    /// Its name in the API and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Booting => "booting",
            Self::Settling => "settling",
            Self::Snapshotting => "snapshotting",
            Self::Ready => "ready",
            Self::Failed => "failed",
        }
    }
}

/// A template that can be restored: everything a restore needs, resolved once.
#[derive(Debug, Clone)]
pub struct ReadyTemplate {
    /// Its name.
    pub name: String,
    /// Its snapshot's id.
    pub snapshot: String,
    /// Its manifest.
    pub manifest: Manifest,
    /// Device state.
    pub vmstate: PathBuf,
    /// Memory for the page server.
    pub memory: MemoryPlan,
    /// Flat memory file, for the file backend.
    pub memory_file: PathBuf,
    /// Shared base image.
    pub root_disk: PathBuf,
    /// Writable disk to copy.
    pub scratch: PathBuf,
    /// What is written over the copy, bottom first.
    pub disk_deltas: Vec<LayerFiles>,
    /// Size of the machine.
    pub size: MachineSize,
}

impl ReadyTemplate {
    /// Resolves a published snapshot.
    pub fn new(name: &str, dir: &std::path::Path, manifest: Manifest, root_disk: PathBuf) -> Self {
        let memory_file = dir.join(manifest::MEMORY);
        Self {
            name: name.to_owned(),
            snapshot: manifest.id.clone(),
            vmstate: dir.join(manifest::VMSTATE),
            memory: snapshotter::golden::memory_plan(dir, false),
            memory_file,
            root_disk,
            scratch: dir.join(manifest::SCRATCH),
            disk_deltas: Vec::new(),
            size: manifest.size,
            manifest,
        }
    }

    /// Resolves a published snapshot, whatever it stands on.
    pub fn resolve(
        name: &str,
        store: &Store,
        images: &Path,
        here: &Compat,
        id: &str,
    ) -> Result<Self, ManifestError> {
        let mut resolved: Option<Self> = None;
        for manifest in store.chain(id)? {
            let dir = store.dir(&manifest.id);
            manifest.check(&dir, here)?;
            resolved = Some(match resolved {
                Some(below) => below.with_layer(name, &dir, manifest),
                None => {
                    let root_disk = images.join(&manifest.image).join(ROOT_DISK);
                    Self::new(name, &dir, manifest, root_disk)
                }
            });
        }
        // A chain has at least the snapshot itself.
        resolved.ok_or_else(|| ManifestError::Chain { id: id.to_owned() })
    }

    /// A snapshot in `dir` that stands on this one.
    pub fn with_layer(&self, name: &str, dir: &Path, manifest: Manifest) -> Self {
        let layer = |name: &String| delta::layer(&dir.join(name), manifest.key.as_deref());
        let mut memory = self.memory.clone();
        memory.layers.extend(manifest.memory_layers.iter().map(layer));
        let working_set = dir.join(manifest::WORKING_SET);
        if working_set.is_file() {
            memory.working_set = Some(working_set);
        }
        let (scratch, disk_deltas) = if manifest.disk_layers.is_empty() {
            (dir.join(manifest::SCRATCH), Vec::new())
        } else {
            let own = manifest.disk_layers.iter().map(layer);
            (self.scratch.clone(), self.disk_deltas.iter().cloned().chain(own).collect())
        };
        Self {
            name: name.to_owned(),
            snapshot: manifest.id.clone(),
            vmstate: dir.join(manifest::VMSTATE),
            memory,
            memory_file: self.memory_file.clone(),
            root_disk: self.root_disk.clone(),
            scratch,
            disk_deltas,
            size: manifest.size,
            manifest,
        }
    }
}

/// A template as the service knows it, ready or not.
#[derive(Debug)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// When it was asked for.
    pub created_at: OffsetDateTime,
    /// What it is made of; `None` for the one that is booted.
    pub spec: Option<Spec>,
    /// What its build says.
    pub log: BuildLog,
    /// Stops its build.
    pub cancel: CancellationToken,
    /// Whether its build, if there was one, has ended.
    pub build_ended: watch::Sender<bool>,
    status: watch::Sender<Status>,
    last_used: RwLock<Option<OffsetDateTime>>,
}

/// What can change about a template.
#[derive(Debug, Clone)]
pub struct Status {
    /// Progress.
    pub state: TemplateState,
    /// What is being done, in words.
    pub message: String,
    /// The step of its build that runs, from 1.
    pub step: Option<usize>,
    /// What is needed to restore it, when it is ready.
    pub ready: Option<Arc<ReadyTemplate>>,
    /// Its snapshot was there already.
    pub cached: bool,
    /// Why it failed.
    pub error: Option<String>,
    /// Which step failed, and how.
    pub failure: Option<Failure>,
}

/// How a step of a build failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// The step, from 1.
    pub step: usize,
    /// What it was to do.
    pub what: String,
    /// How its command ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub exit_code: Option<i32>,
    /// Its last lines of output.
    #[serde(default)]
    pub output: Vec<String>,
}

impl Template {
    /// A template that waits to be made.
    pub fn queued(
        name: &str,
        spec: Option<Spec>,
        created_at: OffsetDateTime,
        log: BuildLog,
    ) -> Self {
        let status = Status {
            state: TemplateState::Queued,
            message: "waiting".to_owned(),
            step: None,
            ready: None,
            cached: false,
            error: None,
            failure: None,
        };
        Self {
            name: name.to_owned(),
            created_at,
            spec,
            log,
            cancel: CancellationToken::new(),
            build_ended: watch::Sender::new(false),
            status: watch::Sender::new(status),
            last_used: RwLock::new(None),
        }
    }

    /// Its progress.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Changes of its progress.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// What is needed to restore it.
    pub fn ready(&self) -> Option<Arc<ReadyTemplate>> {
        self.status.borrow().ready.clone()
    }

    /// Changes its progress.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
        live::changed();
    }

    /// It can be restored.
    pub fn set_ready(&self, ready: Arc<ReadyTemplate>, cached: bool) {
        self.update(|s| {
            s.state = TemplateState::Ready;
            s.message = "ready".to_owned();
            s.step = None;
            s.ready = Some(ready);
            s.cached = cached;
            s.error = None;
            s.failure = None;
        });
    }

    /// It could not be made.
    pub fn set_failed(&self, error: String, failure: Option<Failure>) {
        self.update(|s| {
            s.state = TemplateState::Failed;
            s.message = "failed".to_owned();
            s.step = None;
            s.error = Some(error);
            s.failure = failure;
        });
    }

    /// When a sandbox was last made from it, or a template built on it.
    pub fn last_used(&self) -> Option<OffsetDateTime> {
        *self.last_used.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Sets when it was last used; gives what was there before.
    pub fn set_last_used(&self, at: Option<OffsetDateTime>) -> Option<OffsetDateTime> {
        let mut last = self.last_used.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        std::mem::replace(&mut *last, at)
    }
}
