//! Pause and resume: a sandbox to disk and back, the same processes, the same files.
//!
//! ```text
//! running --pause--> pausing --written, noted, VM killed--> paused
//!    ^                  | not written: the VM runs on          | resume
//!    +------------------+                                      v
//!    +<----noted, handed over---------------------------- resuming
//! ```
//!
//! The order of a pause is what makes a crash harmless: the snapshot is published, then the
//! database says "paused", then the VM is killed. Until the database says so the VM is there; from
//! then on the snapshot is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_agent::client::{AgentClient, AgentError};
use guest_agent::wire::{Base64, FreezeRequest, ResumeRequest};
use rand::RngCore;
use sha2::{Digest, Sha256};

use super::db::{DbError, Stage};
use super::lifecycle::{Machine, RestoreError, Spawned, Timings, millis};
use super::sandbox::{Origin, Sandbox, State};
use super::template::ReadyTemplate;
use super::workspace::{Scratch, WorkspaceError};
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

impl Engine {
    /// Writes a sandbox to disk and frees its memory.
    pub async fn pause(self: &Arc<Self>, id: &str) -> Result<Arc<Sandbox>, TransitionError> {
        let sandbox = self.sandbox(id)?;
        let (engine, paused) = (Arc::clone(self), Arc::clone(&sandbox));
        let work = tokio::spawn(async move { engine.pause_now(&paused).await });
        match work.await {
            Ok(done) => done.map(|()| sandbox),
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }

    async fn pause_now(&self, sandbox: &Sandbox) -> Result<(), TransitionError> {
        let mut slot = sandbox.machine.lock().await;
        let machine = expect(sandbox, slot.as_ref(), State::Running, "pause")?;
        let started = Instant::now();
        sandbox.set_state(State::Pausing);
        sandbox.set_agent(None);
        failpoint::reached("pause.begun").await;
        let id = sandbox.data().id;
        match self.write_paused(sandbox, machine, started).await {
            Ok(()) => {
                failpoint::reached("pause.noted").await;
                if let Some(machine) = slot.take() {
                    machine.destroy().await;
                }
                failpoint::reached("pause.killed").await;
                sandbox.set_state(State::Paused);
                self.expiries.clear(&id);
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
                        sandbox.set_state(State::Running);
                    }
                    // It will not come back: its death is noticed like any other.
                    Err(thaw) => {
                        tracing::error!(sandbox = %id, "and cannot be thawed: {thaw}");
                        machine.vm.kill().await;
                        sandbox.set_state(State::Running);
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
        self.freeze(machine, &data.id).await?;
        let frozen = Instant::now();
        failpoint::reached("pause.frozen").await;
        let mut timings = Timings::new();
        let written =
            self.write_workspace(machine, &base, &source, Scratch::Take, &mut timings).await;
        let (draft, manifest) = written?;
        failpoint::reached("pause.written").await;
        let since = Instant::now();
        let manifest = self.publish(draft, manifest).await?;
        timings.insert("publish".to_owned(), millis(since.elapsed()));
        failpoint::reached("pause.published").await;
        let old = data.paused_in;
        let data = sandbox.update(|d| {
            d.paused_in = Some(manifest.id.clone());
            d.timings_ms = timings;
            d.timings_ms.insert("freeze".to_owned(), millis(frozen - started));
            d.timings_ms.insert("total".to_owned(), millis(started.elapsed()));
        });
        if let Err(e) = self.context.db.vm_sandbox(&data.id, Stage::Paused, &data).await {
            sandbox.update(|d| d.paused_in.clone_from(&old));
            self.drop_workspace(&manifest.id);
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

    /// Brings a paused sandbox back, with a new access token.
    pub async fn resume(
        self: &Arc<Self>,
        id: &str,
        timeout: Option<Duration>,
    ) -> Result<(Arc<Sandbox>, String), TransitionError> {
        let sandbox = self.sandbox(id)?;
        let (engine, resumed) = (Arc::clone(self), Arc::clone(&sandbox));
        let work = tokio::spawn(async move { engine.resume_now(&resumed, timeout).await });
        match work.await {
            Ok(done) => done.map(|token| (sandbox, token)),
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }

    async fn resume_now(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        timeout: Option<Duration>,
    ) -> Result<String, TransitionError> {
        let mut slot = sandbox.machine.lock().await;
        let data = sandbox.data();
        let (State::Paused, Some(snapshot)) = (sandbox.state(), data.paused_in.clone()) else {
            return Err(wrong_state(sandbox, "resume", State::Paused).into());
        };
        let started = Instant::now();
        sandbox.set_state(State::Resuming);
        failpoint::reached("resume.begun").await;
        let token = ids::new_secret("sbx");
        match self.restore_paused(sandbox, &snapshot, &token, timeout, started).await {
            Ok(machine) => {
                let process = Arc::clone(&machine.vm);
                sandbox.set_agent(Some(machine.agent.clone()));
                *slot = Some(machine);
                sandbox.set_state(State::Running);
                drop(slot);
                self.watch_sandbox(sandbox, process);
                if data.restored_from != snapshot {
                    self.drop_workspace(&data.restored_from);
                }
                let left = sandbox.data().expires_at - time::OffsetDateTime::now_utc();
                let left = Duration::try_from(left).unwrap_or_default();
                self.expiries.set(&data.id, Instant::now() + left);
                metrics::histogram!("rethaw_resume_duration_seconds")
                    .record(started.elapsed().as_secs_f64());
                Ok(token)
            }
            Err(e) => {
                sandbox.set_state(State::Paused);
                tracing::error!(sandbox = %data.id, "resume: {e}; the sandbox stays paused");
                Err(e)
            }
        }
    }

    async fn restore_paused(
        &self,
        sandbox: &Sandbox,
        snapshot: &str,
        token: &str,
        timeout: Option<Duration>,
        started: Instant,
    ) -> Result<Machine, TransitionError> {
        let data = sandbox.data();
        let source: ReadyTemplate = self.resolve_workspace(&data.template, snapshot)?;
        let identity = sandbox.identity().values;
        let spawned = Spawned::respawn(&self.context, &source, &data.id, identity).await?;
        if let Err(e) = spawned.set_policy(&data.network).await {
            spawned.discard().await;
            return Err(e.into());
        }
        failpoint::reached("resume.spawned").await;
        let resumed = spawned.load().await?.resume().await?;
        failpoint::reached("resume.running").await;
        let request = resume_request(Some(token));
        let (machine, mut timings) = resumed.revive(&request, RESUME_DEADLINE).await?;
        failpoint::reached("resume.revived").await;
        timings.insert("total".to_owned(), millis(started.elapsed()));
        let timeout = timeout.unwrap_or(Duration::from_secs(data.timeout_seconds));
        let before = data;
        let data = sandbox.update(|d| {
            d.origin = Origin::Resumed;
            d.timings_ms = timings;
            d.token_sha256 = hex::encode(Sha256::digest(token.as_bytes()));
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

fn wrong_state(sandbox: &Sandbox, action: &'static str, wanted: State) -> SandboxError {
    let (id, state) = (sandbox.data().id, sandbox.state());
    if state == State::Deleting {
        return SandboxError::NotFound(id);
    }
    SandboxError::WrongState { id, state, action, wanted: wanted.as_str() }
}

pub(super) fn expect<'a>(
    sandbox: &Sandbox,
    machine: Option<&'a Machine>,
    wanted: State,
    action: &'static str,
) -> Result<&'a Machine, SandboxError> {
    match machine {
        Some(machine) if sandbox.state() == wanted => Ok(machine),
        _ => Err(wrong_state(sandbox, action, wanted)),
    }
}
