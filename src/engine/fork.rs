//! Forks: clones of a running sandbox, each a machine of its own.
//!
//! The source stands still once, for as long as its state takes to be written; the clones are
//! restored while it runs on. A clone's identity is proven before it is handed out, like any
//! other's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::Instrument;

use super::claim::{CreateError, CreateRequest, Created};
use super::identity::Owner;
use super::lifecycle::{self, Timings, millis};
use super::pause::{TransitionError, machine_of};
use super::quota::Size;
use super::sandbox::{Origin, Sandbox};
use super::state::Event;
use super::template::ReadyTemplate;
use super::{Engine, ids};
use crate::failpoint;

/// What a fork came to.
#[derive(Debug)]
pub struct Forked {
    /// The clones, each made or not.
    pub clones: Vec<Result<Created, CreateError>>,
    /// Of the whole: `stop`, for which the source stood still, what was written meanwhile, `clones`
    /// from the first to the last, `total`.
    pub timings: Timings,
}

impl Engine {
    /// Makes `count` clones of a sandbox; each succeeds or fails on its own.
    pub async fn fork(
        self: &Arc<Self>,
        id: &str,
        count: u32,
        made_by: Option<String>,
    ) -> Result<Forked, TransitionError> {
        let sandbox = self.sandbox(id)?;
        // Clones belong to whom the source belongs to, whoever asked for them.
        let (owner, size) = sandbox.with_data(|d| (d.owner.clone(), d.size));
        let admission = self.admit(owner.as_deref(), Size { sandboxes: 1, ..size }, count)?;
        let engine = Arc::clone(self);
        let work = async move {
            let _room = admission;
            engine.fork_now(&sandbox, count, made_by.as_deref()).await
        };
        let work = tokio::spawn(work.in_current_span());
        match work.await {
            Ok(done) => done,
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }

    async fn fork_now(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        count: u32,
        made_by: Option<&str>,
    ) -> Result<Forked, TransitionError> {
        let started = Instant::now();
        let (snapshot, mut timings) = self.freeze_for_fork(sandbox).await?;
        // A clone may be deleted while the next one is being made.
        let pin = self.pin(&snapshot);
        let source = Arc::new(self.resolve_workspace(&sandbox.data().template, &snapshot)?);
        let (mut clones, since) = (Vec::new(), Instant::now());
        // One after the other: on few cores, clones restored at once only slow each other down.
        for _ in 0..count {
            clones.push(self.clone_one(sandbox, &source, made_by).await);
            failpoint::reached("fork.cloned").await;
        }
        drop(pin);
        // Goes when the last clone that stands on it goes; at once if there is none.
        self.drop_workspace(&snapshot).await;
        failpoint::reached("fork.done").await;
        timings.insert("clones".to_owned(), millis(since.elapsed()));
        timings.insert("total".to_owned(), millis(started.elapsed()));
        Ok(Forked { clones, timings })
    }

    /// Stops the source, writes it, lets it run on; returns the published snapshot, and how long what
    /// took.
    pub(super) async fn freeze_for_fork(
        &self,
        sandbox: &Sandbox,
    ) -> Result<(String, Timings), TransitionError> {
        let mut slot = sandbox.machine.lock().await;
        let data = sandbox.data();
        let (base, source) = self.source_of(&data.template, &data.restored_from)?;
        let id = ids::new_id();
        sandbox.apply(Event::Fork)?;
        let machine = machine_of(sandbox, slot.as_ref())?;
        let started = Instant::now();
        let mut timings = Timings::new();
        sandbox.set_agent(None);
        let written = async {
            let freeze = async { Ok::<_, TransitionError>(self.freeze(machine, &data.id).await?) };
            // Of its own: the clones' is not the source's to destroy.
            let (frozen, key) = tokio::join!(freeze, self.new_key(&id));
            let ((), key) = (frozen?, key?);
            failpoint::reached("fork.frozen").await;
            let sources = (&*base, &source);
            let written =
                self.write_workspace(machine, id.clone(), sources, key, &mut timings).await;
            tracing::info!(sandbox = %data.id, ?timings, "written for a fork");
            Ok::<_, TransitionError>(written?)
        };
        let written = written.await;
        failpoint::reached("fork.written").await;
        let thawed = self.thaw(machine).await;
        failpoint::reached("fork.thawed").await;
        let stopped = started.elapsed();
        timings.insert("stop".to_owned(), millis(stopped));
        metrics::histogram!("rethaw_fork_stop_duration_seconds").record(stopped.as_secs_f64());
        sandbox.end(Event::Thawed);
        match thawed {
            Ok(agent) => {
                sandbox.set_agent(Some(agent.clone()));
                if let Some(machine) = slot.as_mut() {
                    machine.agent = agent;
                }
            }
            Err(e) => {
                tracing::error!(sandbox = %data.id, "source of a fork cannot be thawed: {e}");
                machine.vm.kill().await;
                return Err(e.into());
            }
        }
        drop(slot);
        let published = async {
            let (draft, manifest) = written?;
            Ok::<_, TransitionError>(self.publish(draft, manifest).await?)
        };
        if let Err(e) = published.await {
            self.destroy_key(&id).await;
            return Err(e);
        }
        failpoint::reached("fork.published").await;
        Ok((id, timings))
    }

    async fn clone_one(
        self: &Arc<Self>,
        sandbox: &Sandbox,
        source: &Arc<ReadyTemplate>,
        made_by: Option<&str>,
    ) -> Result<Created, CreateError> {
        let started = Instant::now();
        let data = sandbox.data();
        let request = CreateRequest {
            template: data.template.clone(),
            owner: data.owner.clone(),
            timeout: Duration::from_secs(data.timeout_seconds),
            on_timeout: data.on_timeout,
            metadata: data.metadata,
            env: data.env,
            idle_timeout: data.idle_timeout_seconds.map(Duration::from_secs),
            made_by: made_by.map(str::to_owned),
            network: data.network,
        };
        let owner = Owner {
            access_token: self.tokens.issue(),
            env: request.env.clone(),
            network: request.network.clone(),
        };
        let vm = lifecycle::restore(&self.context, source, Some(&owner)).await?;
        self.register(vm, Origin::Forked, source, request, owner.access_token, started).await
    }
}
