//! Templates: what is ready to be restored, and how the first one is made.
//!
//! ```text
//! queued -> booting -> settling -> snapshotting -> ready
//!    |         |           |            |
//!    +---------+-----------+------------+--> failed
//! ```

use std::path::PathBuf;
use std::sync::{Arc, RwLock};

use serde::{Deserialize, Serialize};
use snapshotter::manifest::{self, Manifest};
use snapshotter::vmm::MachineSize;
use time::OffsetDateTime;
use uffd_handler::source::LayerFiles;
use uffd_handler::supervisor::MemoryPlan;
use utoipa::ToSchema;

use crate::live;

/// Name of the template every service has.
pub const BASE: &str = "base";

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
#[derive(Debug)]
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
}

/// A template as the service knows it, ready or not.
#[derive(Debug)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// When it was asked for.
    pub created_at: OffsetDateTime,
    status: RwLock<Status>,
}

/// What can change about a template.
#[derive(Debug, Clone)]
pub struct Status {
    /// Progress.
    pub state: TemplateState,
    /// What is being done, in words.
    pub message: String,
    /// What is needed to restore it, when it is ready.
    pub ready: Option<Arc<ReadyTemplate>>,
    /// Why it failed.
    pub error: Option<String>,
}

impl Template {
    /// A template that waits to be made.
    pub fn queued(name: &str) -> Self {
        let status = Status {
            state: TemplateState::Queued,
            message: "waiting".to_owned(),
            ready: None,
            error: None,
        };
        Self {
            name: name.to_owned(),
            created_at: OffsetDateTime::now_utc(),
            status: RwLock::new(status),
        }
    }

    /// Its progress.
    pub fn status(&self) -> Status {
        self.status.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// What is needed to restore it.
    pub fn ready(&self) -> Option<Arc<ReadyTemplate>> {
        self.status().ready
    }

    /// Changes its progress.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.write().unwrap_or_else(std::sync::PoisonError::into_inner));
        live::changed();
    }
}
