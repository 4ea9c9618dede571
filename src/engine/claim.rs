//! Claims: from a request to a sandbox.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapshotter::vmm::{MemoryBackend, VmRecord};
use tokio::sync::watch;
use tracing::Instrument;

use super::Engine;
use super::db::DbError;
use super::identity::Owner;
use super::lifecycle::{self, Reidentified, RestoreError, millis};
use super::parked::Warm;
use super::quota::{QuotaError, Size};
use super::sandbox::{OnTimeout, Origin, Sandbox};
use super::template::{ReadyTemplate, TemplateState};
use super::to_the_end::ToTheEnd;
use super::workspace::WorkspaceError;
use crate::failpoint;
use crate::live::{self, Series};
use crate::net::policy::Policy;

/// VMs of the pool tried before one is restored on the spot.
const WARM_TRIES: u32 = 3;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// Template name.
    pub template: String,
    /// Id of the API key that asks.
    pub owner: Option<String>,
    /// Life time.
    pub timeout: Duration,
    /// What happens when it is over.
    pub on_timeout: OnTimeout,
    /// The user's own labels.
    pub metadata: BTreeMap<String, String>,
    /// Environment of every command.
    pub env: BTreeMap<String, String>,
    /// Its time is also up when it was not used for this long.
    pub idle_timeout: Option<Duration>,
    /// Name of the request that asked for it, when that one can be sent again.
    pub made_by: Option<String>,
    /// What it may reach.
    pub network: Policy,
}

/// What is given.
#[derive(Debug)]
pub struct Created {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// Its access token: shown once, stored only as a digest.
    pub access_token: String,
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// No such template.
    #[error("no template {0:?}")]
    NoTemplate(String),
    /// The template is not ready.
    #[error("template {name:?} is {state}: {detail}", state = state.as_str())]
    NotReady {
        /// Its name.
        name: String,
        /// How far it is.
        state: TemplateState,
        /// What is being done, or why it failed.
        detail: String,
    },
    /// The snapshot it is to be made from cannot be used.
    #[error(transparent)]
    Snapshot(#[from] WorkspaceError),
    /// It would be more than the key or the service may have.
    #[error(transparent)]
    Quota(#[from] QuotaError),
    /// No VM could be made usable.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The state database.
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Counts a claim as under way for as long as it lives.
struct UnderWay<'a>(&'a watch::Sender<u32>);

impl<'a> UnderWay<'a> {
    fn new(claims: &'a watch::Sender<u32>) -> Self {
        claims.send_modify(|n| *n += 1);
        Self(claims)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

impl Engine {
    /// Makes a sandbox: from the pool, else restored while the caller waits. What was started is
    /// finished or undone also if the caller goes away.
    pub async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<Created, CreateError> {
        let snapshot = match self.template(&request.template) {
            Some(_) => None,
            None => self.snapshot(&request.template),
        };
        let name = request.template.clone();
        let template = self.ready_template(snapshot.as_ref().map_or(&name, |s| &s.template))?;
        let admission = self.admit(request.owner.as_deref(), Size::of(&template), 1)?;
        let engine = Arc::clone(self);
        let work = async move {
            let _room = admission;
            // A template that is being deleted sees this, or is not found any more; see there.
            let _pin = engine.pin(&template.snapshot);
            engine.ready_template(&template.name)?;
            match snapshot {
                Some(snapshot) => engine.create_from(&snapshot, request).await,
                None => Arc::clone(&engine).claim(&template, request).await,
            }
        };
        let done = ToTheEnd::new(work.in_current_span()).await;
        if done.is_err() {
            metrics::counter!("rethaw_sandbox_acquire_failures_total", "template" => name)
                .increment(1);
        }
        done
    }

    /// A template that can be restored, or why it cannot.
    pub fn ready_template(&self, name: &str) -> Result<Arc<ReadyTemplate>, CreateError> {
        let template =
            self.template(name).ok_or_else(|| CreateError::NoTemplate(name.to_owned()))?;
        let status = template.status();
        status.ready.ok_or_else(|| CreateError::NotReady {
            name: name.to_owned(),
            state: status.state,
            detail: status.error.unwrap_or(status.message),
        })
    }

    async fn claim(
        self: Arc<Self>,
        template: &Arc<ReadyTemplate>,
        mut request: CreateRequest,
    ) -> Result<Created, CreateError> {
        for (name, value) in &template.manifest.env {
            request.env.entry(name.clone()).or_insert_with(|| value.clone());
        }
        let under_way = UnderWay::new(&self.claims);
        let started = Instant::now();
        let owner = Owner {
            access_token: self.tokens.issue(),
            env: request.env.clone(),
            network: request.network.clone(),
        };
        let mut tries = 0;
        let created = loop {
            let warm = if tries < WARM_TRIES { self.take_warm(template) } else { None };
            let Some(warm) = warm else {
                let vm = self.restore_now(template, &owner, started).await?;
                let (origin, token) = (Origin::Restored, owner.access_token);
                break self.register(vm, origin, template, request, token, started).await?;
            };
            tries += 1;
            // Before it is anybody's.
            if let Err(e) = warm.inner.set_policy(&owner.network).await {
                self.discard(warm.inner, &e).await;
                continue;
            }
            let network = started.elapsed();
            let token = &owner.access_token;
            let mut data = self.describe(&warm.inner, Origin::Warm, template, &request, token);
            // Before the caller hears of it: a service killed from here on knows whose VM this is,
            // and the next one hands it over again.
            let noted = async {
                let (id, identity) = (&warm.inner.id, &warm.inner.identity);
                self.context.db.vm_claimed(id, &data, identity).await?;
                failpoint::reached("claim.noted").await;
                Ok::<_, DbError>(())
            };
            let (handed_over, noted) = tokio::join!(warm.hand_over(&owner), noted);
            match (handed_over, noted) {
                (Ok(mut phases), Ok(())) => {
                    failpoint::reached("claim.handed_over").await;
                    // A pooled VM's restore is nobody's wait.
                    phases.insert("network".to_owned(), millis(network));
                    phases.insert("total".to_owned(), millis(started.elapsed()));
                    data.timings_ms = phases;
                    break self.enroll(warm.inner, data, owner.access_token);
                }
                (Ok(_), Err(e)) => {
                    warm.inner.machine.destroy().await;
                    return Err(e.into());
                }
                (Err(e), _) => self.discard(warm.inner, &e).await,
            }
        };
        // Not earlier: the next VM's start would take the CPU from the end of this claim.
        drop(under_way);
        let origin = created.sandbox.with_data(|data| data.origin);
        let labels = [("template", template.name.clone()), ("origin", origin.as_str().to_owned())];
        let elapsed = started.elapsed();
        metrics::histogram!("rethaw_sandbox_acquire_duration_seconds", &labels)
            .record(elapsed.as_secs_f64());
        let warm = matches!(origin, Origin::Warm);
        live::took(if warm { Series::Warm } else { Series::Cold }, elapsed);
        if let Some(template) = self.template(&template.name) {
            self.touch(&template);
        }
        Ok(created)
    }

    /// Restores while somebody waits; with the spare process, if there is one.
    async fn restore_now(
        &self,
        template: &ReadyTemplate,
        owner: &Owner,
        started: Instant,
    ) -> Result<Reidentified, RestoreError> {
        if let Some(spare) = self.pool_of(template).and_then(|pool| pool.take_spare()) {
            match spare.finish(started, Some(owner)).await {
                Ok(vm) => return Ok(vm),
                // It may have died while it waited.
                Err(e) => tracing::warn!("spare: {e}; starting another"),
            }
        }
        lifecycle::restore(&self.context, template, Some(owner)).await
    }

    fn take_warm(&self, template: &ReadyTemplate) -> Option<Warm> {
        self.pool_of(template).and_then(|pool| pool.take())
    }

    async fn discard(&self, vm: Reidentified, why: &RestoreError) {
        tracing::warn!(vm = %vm.id, "destroyed at claim: {why}");
        let id = vm.id.clone();
        vm.machine.destroy().await;
        if let Err(e) = self.context.db.vm_gone(&id).await {
            tracing::error!(vm = %id, "{e}");
        }
    }

    /// Has all memory of a VM put in place: from then on it needs no page server.
    async fn graduate(&self, record: VmRecord) {
        if record.backend != MemoryBackend::Uffd {
            return;
        }
        let pager = Arc::clone(&self.pager);
        let asked = tokio::task::spawn_blocking(move || pager.graduate(&record.id));
        if let Ok(Err(e)) = asked.await {
            tracing::debug!("graduation: {e}");
        }
    }

    /// Removes a sandbox whose VM dies by itself, after having let it graduate if it lived long
    /// enough.
    pub(super) fn watch_sandbox(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        vm: Arc<dyn snapshotter::vmm::Vm>,
    ) {
        // Weak: the watcher must not keep a deleted sandbox's machine alive.
        let (engine, sandbox) = (Arc::downgrade(self), Arc::downgrade(sandbox));
        let graduate_after = self.config.graduate_after;
        tokio::spawn(async move {
            if let Some(after) = graduate_after
                && tokio::time::timeout(after, vm.exited()).await.is_err()
                && let Some(engine) = engine.upgrade()
            {
                engine.graduate(vm.record()).await;
            }
            let reason = vm.exited().await;
            let (Some(engine), Some(sandbox)) = (engine.upgrade(), sandbox.upgrade()) else {
                return;
            };
            let same = {
                let machine = sandbox.machine.lock().await;
                machine.as_ref().is_some_and(|m| Arc::ptr_eq(&m.vm, &vm))
            };
            drop(vm);
            // Paused or deleted meanwhile: the process was meant to go.
            if same {
                tracing::warn!(sandbox = %sandbox.data().id, "VM {reason}");
                let _ = engine.remove(sandbox, "vm_died", None).await;
            }
        });
    }
}
