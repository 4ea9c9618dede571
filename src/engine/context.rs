//! What every restore needs besides its template: the driver, the keys, the networks, and how memory
//! and disk of a clone are made.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use snapshotter::delta;
use snapshotter::disk;
use snapshotter::vmm::{Driver, MemoryBackend};
use uffd_handler::seal::{Key, KeySource};
use uffd_handler::source::LayerFiles;
use uffd_handler::supervisor::MemoryPlan;

use super::db::Db;
use super::keyring::Keyring;
use super::lifecycle::{RestoreError, file};
use super::template::ReadyTemplate;
use crate::net::Network;

/// What a restore needs to know besides the template.
#[derive(Debug, Clone)]
pub struct RestoreContext {
    /// The VMM.
    pub driver: Arc<dyn Driver>,
    /// Durable state.
    pub db: Db,
    /// Parent of all VM directories.
    pub run: PathBuf,
    /// Keys of workspaces.
    pub keys: Arc<Keyring>,
    /// Templates whose clones map the memory file.
    pub file_backed: Arc<BTreeSet<String>>,
    /// Whether working sets are put in place ahead of demand.
    pub working_sets: bool,
    /// Networks for VMs, where they can be made.
    pub network: Option<Arc<Network>>,
}

impl RestoreContext {
    /// What a clone's memory is made of.
    pub(super) fn memory(&self, template: &ReadyTemplate) -> MemoryPlan {
        let mut plan = template.memory.clone();
        if !self.working_sets {
            plan.working_set = None;
        }
        plan
    }

    /// How a clone gets its memory. Only one flat file can be mapped: what was paused is layers, and
    /// to see what is asked for takes the page server.
    pub(super) fn backend(&self, template: &ReadyTemplate) -> MemoryBackend {
        let memory = &template.memory;
        let mappable = memory.layers.len() == 1 && !memory.record;
        if mappable && self.file_backed.contains(&template.name) {
            MemoryBackend::File
        } else {
            MemoryBackend::Uffd
        }
    }
}

/// How a VM's own disk is made.
pub(super) struct Disk {
    base: PathBuf,
    deltas: Vec<LayerFiles>,
    target: PathBuf,
    key: Option<String>,
    keys: Arc<Keyring>,
}

impl Disk {
    pub(super) fn of(template: &ReadyTemplate, target: PathBuf, keys: Arc<Keyring>) -> Self {
        Self {
            base: template.scratch.clone(),
            deltas: template.disk_deltas.clone(),
            target,
            key: template.manifest.key.clone(),
            keys,
        }
    }

    /// Makes it, and gives the key of what is restored, if it has one. Blocks.
    pub(super) fn make(self) -> Result<Option<Key>, RestoreError> {
        // First: without it, nothing else is worth doing, and this is what there is to say.
        let key = self.key.map(|name| self.keys.key(&name)).transpose()?;
        disk::clone_file(&self.base, &self.target).map_err(file("cannot copy", &self.base))?;
        if !self.deltas.is_empty() {
            let target = File::options().read(true).write(true).open(&self.target);
            let target = target.map_err(file("cannot open", &self.target))?;
            delta::apply(&self.deltas, &target, &*self.keys)?;
        }
        Ok(key)
    }
}
