//! Pause and resume: a sandbox to disk and back, the same processes, the same files. The states are in
//! [`super::state`].
//!
//! The order of a pause is what makes a crash harmless: the snapshot is published, then the
//! database says "paused", then the VM is killed. Until the database says so the VM is there; from
//! then on the snapshot is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_agent::client::{AgentClient, AgentError};
use guest_agent::wire::{Base64, FreezeRequest, ResumeRequest};
use rand::RngCore;
use tracing::Instrument;

use super::db::{DbError, Stage};
use super::enroll::TOLD;
use super::lifecycle::{RestoreError, Spawned, Timings, millis};
use super::machine::Machine;
use super::quota::QuotaError;
use super::sandbox::{Origin, Sandbox};
use super::state::Event;
use super::template::ReadyTemplate;
use super::token::AccessToken;
use super::workspace::WorkspaceError;
use super::{Engine, SandboxError, ids};
use crate::failpoint;

/// How long the guest may take to stop its workload.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);
/// How long the guest may take to come back.
const RESUME_DEADLINE: Duration = Duration::from_secs(10);

/// Why a sandbox was not paused or resumed.
#[derive(Debug, thiserror::Error)]
pub enum TransitionError {
    /// Not there, or in another state.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// It would be more than its key or the service may have.
    #[error(transparent)]
    Quota(#[from] QuotaError),
    /// It could not be written, or what was written cannot be used.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    /// Its VM could not be made to run.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The state database.
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Which access token a sandbox comes back with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenChoice {
    /// A new one: the old one opens nothing any more.
    New,
    /// The one it had, for clients that were told no other.
    Same,
}

impl Engine {
    /// Writes a sandbox to disk and frees its memory.
    pub async fn pause(self: &Arc<Self>, id: &str) -> Result<Arc<Sandbox>, TransitionError> {
        let sandbox = self.sandbox(id)?;
        let (engine, paused) = (Arc::clone(self), Arc::clone(&sandbox));
        let work = async move { engine.pause_now(&paused).await };
        let work = tokio::spawn(work.in_current_span());
        match work.await {
            Ok(done) => done.map(|()| sandbox),
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }

    async fn pause_now(&self, sandbox: &Sandbox) -> Result<(), TransitionError> {
        let mut slot = sandbox.machine.lock().await;
        sandbox.apply(Event::Pause)?;
        let machine = machine_of(sandbox, slot.as_ref())?;
        let started = Instant::now();
        sandbox.set_agent(None);
        failpoint::reached("pause.begun").await;
        let id = sandbox.data().id;
        match self.write_paused(sandbox, machine, started).await {
            Ok(()) => {
                failpoint::reached("pause.noted").await;
                if let Some(machine) = slot.take() {
                    let lease = machine.end().await;
                    if let (Some(network), Some(lease)) = (self.network(), lease) {
                        network.keep(lease, &sandbox.identity().values.mac);
                    }
                }
                failpoint::reached("pause.killed").await;
                sandbox.end(Event::Written);
                self.expiries.clear(&id);
                if let Some(key) = sandbox.data().key {
                    self.context.keys.forget(&key);
                }
                metrics::histogram!("rethaw_pause_duration_seconds")
                    .record(started.elapsed().as_secs_f64());
                Ok(())
            }
            Err(e) => {
                tracing::error!(sandbox = %id, "pause: {e}; the sandbox runs on");
                match self.thaw(machine).await {
                    Ok(agent) => {
                        sandbox.set_agent(Some(agent.clone()));
                        if let Some(machine) = slot.as_mut() {
                            machine.agent = agent;
                        }
                        sandbox.end(Event::Thawed);
                    }
                    // It will not come back: its death is noticed like any other.
                    Err(thaw) => {
                        tracing::error!(sandbox = %id, "and cannot be thawed: {thaw}");
                        machine.vm.kill().await;
                        sandbox.end(Event::Thawed);
                    }
                }
                Err(e)
            }
        }
    }

    async fn write_paused(
        &self,
        sandbox: &Sandbox,
        machine: &Machine,
        started: Instant,
    ) -> Result<(), TransitionError> {
        let data = sandbox.data();
        let (base, source) = self.source_of(&data.template, &data.restored_from)?;
        let mut timings = Timings::new();
        let stop = async {
            self.freeze(machine, &data.id).await?;
            timings.insert("freeze".to_owned(), millis(started.elapsed()));
            Ok::<_, TransitionError>(())
        };
        // A first key has to be written and synced; the guest need not stand still for that alone.
        // Neither is given up for the other: a stop that was begun has to end before it is undone.
        let (stopped, key) = tokio::join!(stop, self.key_of(&data));
        let ((), key) = (stopped?, key?);
        failpoint::reached("pause.frozen").await;
        let key_name = key.as_ref().map(|key| key.name.clone());
        let sources = (&*base, &source);
        let written = self.write_workspace(machine, ids::new_id(), sources, key, &mut timings);
        let (draft, manifest) = written.await?;
        failpoint::reached("pause.written").await;
        let since = Instant::now();
        let manifest = self.publish(draft, manifest).await?;
        timings.insert("publish".to_owned(), millis(since.elapsed()));
        failpoint::reached("pause.published").await;
        let before = data;
        let data = sandbox.update(|d| {
            d.paused_in = Some(manifest.id.clone());
            d.key = key_name;
            d.timings_ms = timings;
            d.timings_ms.insert("total".to_owned(), millis(started.elapsed()));
        });
        if let Err(e) = self.context.db.vm_paused(&data.id, &data).await {
            sandbox.update(|d| *d = before);
            self.drop_workspace(&manifest.id).await;
            return Err(e.into());
        }
        Ok(())
    }

    /// Stops the workload, then the vCPUs: what resumes first is the agent, alone.
    pub(super) async fn freeze(&self, machine: &Machine, id: &str) -> Result<(), RestoreError> {
        let request = FreezeRequest { sync: false };
        let frozen = machine.agent.freeze(&request, FREEZE_DEADLINE).await;
        frozen.map_err(|source| RestoreError::Agent {
            id: id.to_owned(),
            step: "freeze",
            source,
        })?;
        Ok(machine.vm.pause().await?)
    }

    /// Undoes [`Engine::freeze`] in a VM that was not given up.
    ///
    /// The connection there is comes first: it outlives a stop of the vCPUs, commands may be running
    /// on it, and a serial port takes no second one while it lasts.
    pub(super) async fn thaw(&self, machine: &Machine) -> Result<AgentClient, RestoreError> {
        machine.vm.resume().await?;
        let failed = |source| RestoreError::Agent {
            id: machine.vm.record().id.clone(),
            step: "thaw",
            source,
        };
        match machine.agent.resume(&resume_request(None), RESUME_DEADLINE).await {
            Ok(_) => return Ok(machine.agent.clone()),
            Err(AgentError::Disconnected(_)) => {}
            Err(e) => return Err(failed(e)),
        }
        let agent = machine.vm.connect_agent(RESUME_DEADLINE).await.map_err(failed)?;
        agent.resume(&resume_request(None), RESUME_DEADLINE).await.map_err(failed)?;
        Ok(agent)
    }

    /// Brings a paused sandbox back; returns its access token, too.
    pub async fn resume(
        self: &Arc<Self>,
        id: &str,
        timeout: Option<Duration>,
        token: TokenChoice,
    ) -> Result<(Arc<Sandbox>, String), TransitionError> {
        let sandbox = self.sandbox(id)?;
        let (engine, resumed) = (Arc::clone(self), Arc::clone(&sandbox));
        let work = async move { engine.resume_now(&resumed, timeout, token).await };
        let work = tokio::spawn(work.in_current_span());
        match work.await {
            Ok(done) => done.map(|token| (sandbox, token)),
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }

    async fn resume_now(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        timeout: Option<Duration>,
        token: TokenChoice,
    ) -> Result<String, TransitionError> {
        let mut slot = sandbox.machine.lock().await;
        let room = self.readmit(sandbox)?;
        let started = Instant::now();
        sandbox.apply(Event::Resume)?;
        let data = sandbox.data();
        let Some(snapshot) = data.paused_in.clone() else {
            sandbox.end(Event::Failed);
            return Err(SandboxError::NotFound(data.id).into());
        };
        failpoint::reached("resume.begun").await;
        let old = match token {
            TokenChoice::New => None,
            TokenChoice::Same => self.tokens.again(&data.token_nonce),
        };
        let token = old.unwrap_or_else(|| self.tokens.issue());
        let restored = self.restore_paused(sandbox, &snapshot, &token, timeout, started).await;
        drop(room);
        match restored {
            Ok(machine) => {
                let process = Arc::clone(&machine.vm);
                machine.agent.start_http_after(TOLD);
                sandbox.set_agent(Some(machine.agent.clone()));
                *slot = Some(machine);
                sandbox.end(Event::Revived);
                drop(slot);
                self.watch_sandbox(sandbox, process);
                sandbox.touch();
                self.expiries.set(&data.id, sandbox.ends_at());
                if data.restored_from != snapshot {
                    // Nobody need wait for that.
                    let engine = Arc::clone(self);
                    self.spawn(async move { engine.drop_workspace(&data.restored_from).await });
                }
                metrics::histogram!("rethaw_resume_duration_seconds")
                    .record(started.elapsed().as_secs_f64());
                Ok(token.secret)
            }
            Err(e) => {
                sandbox.end(Event::Failed);
                tracing::error!(sandbox = %data.id, "resume: {e}; the sandbox stays paused");
                Err(e)
            }
        }
    }

    async fn restore_paused(
        &self,
        sandbox: &Sandbox,
        snapshot: &str,
        token: &AccessToken,
        timeout: Option<Duration>,
        started: Instant,
    ) -> Result<Machine, TransitionError> {
        let data = sandbox.data();
        let source: ReadyTemplate = self.resolve_workspace(&data.template, snapshot)?;
        let identity = sandbox.identity().values;
        let attached = data.addresses.clone();
        let spawned =
            Spawned::respawn(&self.context, &source, &data.id, identity, attached).await?;
        if let Err(e) = spawned.set_policy(&data.network).await {
            spawned.discard().await;
            return Err(e.into());
        }
        failpoint::reached("resume.spawned").await;
        let resumed = spawned.load().await?.resume().await?;
        failpoint::reached("resume.running").await;
        let request = resume_request(Some(&token.secret));
        let (machine, mut timings) = resumed.revive(&request, RESUME_DEADLINE).await?;
        failpoint::reached("resume.revived").await;
        timings.insert("total".to_owned(), millis(started.elapsed()));
        let timeout = timeout.unwrap_or(Duration::from_secs(data.timeout_seconds));
        let before = data;
        let data = sandbox.update(|d| {
            d.origin = Origin::Resumed;
            d.timings_ms = timings;
            d.token_sha256 = token.sha256();
            d.token_nonce.clone_from(&token.nonce);
            d.timeout_seconds = timeout.as_secs();
            d.expires_at = time::OffsetDateTime::now_utc() + timeout;
            snapshot.clone_into(&mut d.restored_from);
            d.paused_in = None;
            d.addresses = machine.addresses().cloned();
        });
        if let Err(e) = self.context.db.vm_sandbox(&data.id, Stage::Claimed, &data).await {
            machine.destroy().await;
            sandbox.update(|d| *d = before);
            return Err(e.into());
        }
        failpoint::reached("resume.noted").await;
        Ok(machine)
    }
}

/// Fresh entropy and the time; taken now, send it at once.
pub(super) fn resume_request(token: Option<&str>) -> ResumeRequest {
    let mut entropy = vec![0_u8; 64];
    rand::rng().fill_bytes(&mut entropy);
    ResumeRequest {
        entropy: Base64(entropy),
        wall_clock_unix_nanos: ids::wall_clock_unix_nanos(),
        access_token: token.map(str::to_owned),
        ..ResumeRequest::default()
    }
}

/// The machine of a sandbox that was running when its transition began.
pub(super) fn machine_of<'a>(
    sandbox: &Sandbox,
    machine: Option<&'a Machine>,
) -> Result<&'a Machine, SandboxError> {
    machine.ok_or_else(|| {
        sandbox.end(Event::Thawed);
        SandboxError::NotFound(sandbox.data().id)
    })
}
