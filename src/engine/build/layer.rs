//! Freezes a build's VM and writes it as a layer on its parent.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use guest_agent::wire::SettleRequest;
use snapshotter::delta::{self, DeltaError, index_of};
use snapshotter::golden::QUIET;
use snapshotter::manifest::{DELTA, DISK_DELTA, FORMAT, Manifest};
use snapshotter::store::Draft;
use uffd_handler::source::{LayerFiles, MemoryLayers};

use super::spec::Spec;
use super::{BuildError, SETTLE_DEADLINE};
use crate::engine::Engine;
use crate::engine::keyring::Keyring;
use crate::engine::machine::Machine;
use crate::engine::template::{ReadyTemplate, Template, TemplateState};
use crate::engine::workspace::{blocking, file};
use crate::failpoint;

/// Layers on a booted template before the next one is written onto that template again: each costs
/// every page lookup a search.
const MAX_LAYERS: usize = 4;

/// What a derived snapshot stands on.
pub fn below(manifest: &Manifest) -> &str {
    manifest.parent.as_deref().unwrap_or_default()
}

impl Engine {
    /// Settles the machine, stops it and writes it; it is gone when this returns.
    pub(super) async fn write_layer(
        &self,
        template: &Template,
        spec: &Spec,
        parent: &ReadyTemplate,
        machine: Machine,
        id: &str,
    ) -> Result<(Draft, Manifest), BuildError> {
        self.enter(template, TemplateState::Settling, "settling");
        let settled = machine.agent.settle(&SettleRequest::default(), SETTLE_DEADLINE).await;
        // The host's end is closed before the freeze: a clone must not remember a connection.
        let (vm, dir, network) = machine.disconnect();
        let started = Instant::now();
        let written = async {
            settled.map_err(BuildError::Settle)?;
            tokio::time::sleep(QUIET).await;
            failpoint::reached("build.settled").await;
            self.enter(template, TemplateState::Snapshotting, "writing the snapshot");
            vm.pause().await?;
            let draft = self.store.draft(id).map_err(file("cannot make", &self.store.dir(id)))?;
            vm.snapshot(draft.dir(), None).await?;
            Ok::<_, BuildError>(draft)
        };
        let written = written.await;
        vm.kill().await;
        drop(network);
        let draft = written?;
        let root = self.store.chain(&parent.snapshot)?.swap_remove(0);
        let below = match parent.memory.layers.len() > MAX_LAYERS {
            true => self.resolve_workspace(&parent.name, &root.id)?,
            false => parent.clone(),
        };
        let layer = Layer {
            keys: Arc::clone(&self.context.keys),
            upper: parent.own_layers(&below),
            disk_bytes: parent.disk_bytes()?,
            disk: dir.scratch(),
            draft: draft.dir().to_owned(),
            below: below.clone(),
        };
        blocking(move || layer.write()).await?;
        drop(dir);
        tracing::info!(template = %template.name, took = ?started.elapsed(), "layer written");
        let mut env = parent.manifest.env.clone();
        env.extend(spec.env().map(|(name, value)| (name.clone(), value.clone())));
        let manifest = Manifest {
            format: FORMAT,
            id: id.to_owned(),
            created_at: time::OffsetDateTime::now_utc(),
            parent: Some(below.snapshot.clone()),
            size: parent.size,
            compat: self.driver().compat().clone(),
            image: parent.manifest.image.clone(),
            image_digests: parent.manifest.image_digests.clone(),
            files: Default::default(),
            memory_layers: vec![DELTA.to_owned()],
            disk_layers: vec![DISK_DELTA.to_owned()],
            key: None,
            template: true,
            env,
            boot: None,
            frozen_identity: Default::default(),
        };
        Ok((draft, manifest))
    }
}

/// What is left to write once the VM is gone.
struct Layer {
    keys: Arc<Keyring>,
    /// What it stands on.
    below: ReadyTemplate,
    /// Memory layers between that and what the VM wrote, when the chain had become long.
    upper: Vec<LayerFiles>,
    disk: PathBuf,
    disk_bytes: u64,
    draft: PathBuf,
}

impl Layer {
    fn write(self) -> Result<(), BuildError> {
        if !self.upper.is_empty() {
            self.merge()?;
        }
        let open = |path: &Path| File::open(path).map_err(file("cannot read", path));
        let (disk, flat) = (open(&self.disk)?, open(&self.below.scratch)?);
        let chain = self.below.disk_chain();
        let below = MemoryLayers::open_with(&chain, self.disk_bytes, &*self.keys);
        let below = below.map_err(DeltaError::from)?;
        delta::write_disk(&disk, &flat, &below, &self.draft.join(DISK_DELTA), None)?;
        Ok(())
    }

    /// Makes what the VM wrote, which stands on all of `upper`, a layer on `below`.
    fn merge(&self) -> Result<(), BuildError> {
        let (top, merged) = (self.draft.join(DELTA), self.draft.join("merged"));
        let deltas: Vec<LayerFiles> =
            self.upper.iter().cloned().chain([delta::layer(&top, None)]).collect();
        let (base, bytes) = (&self.below.memory.layers, self.below.size.memory_bytes);
        delta::merge(base, &deltas, bytes, &merged, &*self.keys, None)?;
        for (from, to) in [(index_of(&merged), index_of(&top)), (merged, top)] {
            std::fs::rename(&from, &to).map_err(file("cannot rename", &from))?;
        }
        Ok(())
    }
}
