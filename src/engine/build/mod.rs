//! Builds: a derived template is made in a real VM of its parent.
//!
//! ```text
//! queued --parent ready, its turn--> booting --steps ran--> settling --frozen--> snapshotting
//!    |                                  |                      |                     |  tried,
//!    |  the same was built before       +------- failed <------+---------------------+  published
//!    +------------------------------------------------------------------------------+--> ready
//! ```
//!
//! What is written is a layer on the parent: the pages and disk blocks that differ. A crash at any
//! point leaves a row that is not final; the build is done again at the next start, and what it had
//! is gone by then: its VM like any that nobody was promised, its draft with the store's temporary
//! files.

mod command;
mod layer;
mod log;
mod spec;
mod steps;

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_agent::client::AgentError;
use snapshotter::delta::DeltaError;
use snapshotter::manifest::ManifestError;
use snapshotter::vmm::VmmError;

pub use log::{BuildLog, Extent, Kind};
pub use spec::{Spec, Step, check_name, is_sha256};
pub use steps::{Runner, StepError};

use super::Engine;
use super::db::DbError;
use super::lifecycle::{self, RestoreError};
use super::template::{Failure, ReadyTemplate, Template, TemplateState};
use super::trial::{Checks, TrialError};
use super::workspace::WorkspaceError;
use crate::failpoint;

/// How often a build is begun before it is taken for what ends the service.
pub(super) const MAX_ATTEMPTS: u32 = 3;

/// Why a template could not be derived.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Its parent is gone or failed.
    #[error("its parent {name:?} {problem}")]
    Parent {
        /// The parent.
        name: String,
        /// What is the matter with it.
        problem: String,
    },
    /// The parent does not come up.
    #[error("restoring the parent: {0}")]
    Restore(#[from] RestoreError),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The guest could not be settled.
    #[error("settling: {0}")]
    Settle(AgentError),
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The memory or the disk.
    #[error(transparent)]
    Delta(#[from] DeltaError),
    /// The snapshot failed its trial.
    #[error(transparent)]
    Trial(#[from] TrialError),
    /// It could not be published.
    #[error(transparent)]
    Publish(#[from] WorkspaceError),
    /// The same was built before, and cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The state database.
    #[error(transparent)]
    Db(#[from] DbError),
    /// It is not wanted any more.
    #[error("cancelled")]
    Cancelled,
}

impl BuildError {
    fn failure(&self) -> Option<Failure> {
        match self {
            Self::Step(e) | Self::Trial(TrialError::Check(e)) => Some(e.failure.clone()),
            _ => None,
        }
    }
}

impl Engine {
    /// Queues a template's build; it ends with the engine, and goes on after the next start.
    pub(super) fn enqueue(self: &Arc<Self>, template: Arc<Template>, attempt: u32) {
        let engine = Arc::clone(self);
        self.spawn(async move { engine.run_build(&template, attempt).await });
    }

    /// Builds a template, and says in it how that ended.
    pub(super) async fn run_build(self: Arc<Self>, template: &Arc<Template>, attempt: u32) {
        let started = Instant::now();
        let log = &template.log;
        match self.build(template, attempt).await {
            Ok((ready, cached)) => {
                let took = started.elapsed();
                tracing::info!(template = %template.name, snapshot = %ready.snapshot, cached, ?took,
                    "template is ready");
                if let Err(e) = self.open_pool(ready).await {
                    tracing::error!(template = %template.name, "pool: {e}");
                }
                let outcome = if cached { "cached" } else { "built" };
                metrics::counter!("rethaw_builds_total", "outcome" => outcome).increment(1);
                log.write(Kind::End, None, "ready");
            }
            Err(BuildError::Cancelled) => log.write(Kind::End, None, "cancelled"),
            Err(e) => {
                tracing::warn!(template = %template.name, "build failed: {e}");
                template.set_failed(e.to_string(), e.failure());
                if let Err(e) = self.note_template(template, attempt).await {
                    tracing::error!(template = %template.name, "{e}");
                }
                metrics::counter!("rethaw_builds_total", "outcome" => "failed").increment(1);
                log.write(Kind::End, None, &format!("failed: {e}"));
            }
        }
        let _ = template.build_ended.send_replace(true);
    }

    /// Waits for its turn and its parent, then makes the template or finds it made.
    async fn build(
        &self,
        template: &Arc<Template>,
        attempt: u32,
    ) -> Result<(Arc<ReadyTemplate>, bool), BuildError> {
        let spec = template.spec.clone().unwrap_or_default();
        let turn = async {
            // The parent first: who held the slot while waiting for a parent that is yet to get it
            // would wait for ever.
            let parent = self.parent_of(&spec).await?;
            let pin = self.pin(&parent.snapshot);
            let slot = self.build_slot.acquire().await.map_err(|_| BuildError::Cancelled)?;
            Ok::<_, BuildError>((slot, pin, parent))
        };
        let (_slot, _parent, parent) = tokio::select! {
            turn = turn => turn?,
            () = template.cancel.cancelled() => return Err(BuildError::Cancelled),
        };
        let id = spec.snapshot_id(&parent.snapshot);
        let _own = self.pin(&id);
        // The intent: what is published under this id from now on is not an orphan.
        self.note_build(template, &id, attempt).await?;
        failpoint::reached("build.begun").await;
        let cached = self.store.dir(&id).exists();
        if !cached {
            let started = Instant::now();
            self.derive(template, &spec, &parent, &id).await?;
            failpoint::reached("build.published").await;
            metrics::histogram!("rethaw_build_duration_seconds")
                .record(started.elapsed().as_secs_f64());
        }
        let ready = Arc::new(self.resolve_workspace(&template.name, &id)?);
        template.set_ready(Arc::clone(&ready), cached);
        self.note_template(template, attempt).await?;
        failpoint::reached("build.noted").await;
        Ok((ready, cached))
    }

    /// The parent, as soon as it is ready.
    async fn parent_of(&self, spec: &Spec) -> Result<Arc<ReadyTemplate>, BuildError> {
        let name = spec.from.clone();
        let problem = |problem: String| BuildError::Parent { name: name.clone(), problem };
        let parent = self.template(&name).ok_or_else(|| problem("is not there".to_owned()))?;
        let mut status = parent.watch();
        let status = status.wait_for(|s| s.state.is_final()).await;
        let status = status.map_err(|_| problem("is gone".to_owned()))?.clone();
        self.touch(&parent);
        status.ready.ok_or_else(|| problem(format!("failed: {}", status.error.unwrap_or_default())))
    }

    fn enter(&self, template: &Template, state: TemplateState, message: &str) {
        tracing::info!(template = %template.name, "{message}");
        template.log.write(Kind::State, None, message);
        template.update(|s| {
            s.state = state;
            s.step = None;
            message.clone_into(&mut s.message);
        });
    }

    /// The VM, from its restore to a published layer.
    async fn derive(
        &self,
        template: &Template,
        spec: &Spec,
        parent: &ReadyTemplate,
        id: &str,
    ) -> Result<(), BuildError> {
        self.enter(template, TemplateState::Booting, &format!("restoring {}", parent.name));
        let vm = lifecycle::restore(&self.context, parent, None).await?;
        let vm_id = vm.id.clone();
        let log = &template.log;
        let ran = async {
            let env = parent.manifest.env.clone();
            let mut runner = Runner::new(&vm.machine.agent, template, log, &self.inputs, env);
            runner.run(spec).await?;
            Ok(())
        };
        let ran = tokio::select! {
            ran = ran => ran,
            reason = vm.machine.vm.exited() => {
                let text = format!("the VM {reason}");
                Err(BuildError::Settle(AgentError::Disconnected(text)))
            }
            () = template.cancel.cancelled() => Err(BuildError::Cancelled),
        };
        if let Err(e) = ran {
            vm.machine.destroy().await;
            self.context.db.vm_gone(&vm_id).await?;
            return Err(e);
        }
        failpoint::reached("build.stepped").await;
        let written = self.write_layer(template, spec, parent, vm.machine, id).await;
        self.context.db.vm_gone(&vm_id).await?;
        let (draft, manifest) = written?;
        failpoint::reached("build.written").await;
        self.enter(template, TemplateState::Snapshotting, "trying the snapshot");
        let below = self.resolve_workspace(&template.name, layer::below(&manifest))?;
        let unpublished = below.with_layer(&template.name, draft.dir(), manifest.clone());
        let checks = Checks { spec, template, log };
        self.trial(&unpublished, draft.dir(), Some(checks)).await?;
        failpoint::reached("build.tried").await;
        self.publish(draft, manifest).await?;
        Ok(())
    }
}

/// How long the guest may take to settle: it writes everything to its disk.
pub(super) const SETTLE_DEADLINE: Duration = Duration::from_secs(120);
