//! From a template to a machine somebody may use, one type per stage:
//!
//! ```text
//! Spawned --load--> Loaded --resume--> Resumed --reidentify--> Reidentified --> parked or claimed
//!    |                 |                  |                         |
//!    +-----------------+------ any failure: destroyed --------------+
//! ```
//!
//! Only [`Resumed::reidentify`] makes a [`Reidentified`], and it needs a
//! [`ProvenIdentity`], which only a complete, read-back report yields. A VM whose identity was not
//! proven new therefore cannot be parked, and what is not parked or reidentified cannot be claimed.
//!
//! Dropping any stage kills the VM and removes its directory; nothing here outlives its owner
//! unless it was asked to.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_agent::client::AgentError;
use guest_agent::wire::{IdentityFailure, ProvenIdentity, ResumeRequest};
use snapshotter::delta::DeltaError;
use snapshotter::vmm::{Nic, Priority, RestoreSpec, Shell, Vm, VmRecord, VmmError};
use uffd_handler::seal::SealError;

use super::context::{Disk, RestoreContext};
use super::db::{Db, DbError, StoredIdentity};
use super::identity::{self, Identity, Owner};
use super::ids;
use super::machine::{Machine, RunDir};
use super::template::ReadyTemplate;
use crate::failpoint;
use crate::live::{self, Series};
use crate::net::policy::Policy;
use crate::net::{Addresses, Lease, NetworkError};

/// How long a restored guest may take to answer for the first time.
const AGENT_DEADLINE: Duration = Duration::from_secs(10);
/// How long the guest may take to apply its identity; hooks have deadlines of their own inside it.
const IDENTITY_DEADLINE: Duration = Duration::from_secs(15);

/// Milliseconds by phase, in the form of `timings_ms`.
pub type Timings = BTreeMap<String, f64>;

/// Milliseconds of a duration, to the microsecond.
pub fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Why a VM did not become usable.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The agent does not answer or refuses.
    #[error("guest agent of VM {id}: {step}: {source}")]
    Agent {
        /// The VM.
        id: String,
        /// What was asked.
        step: &'static str,
        /// What came back.
        source: AgentError,
    },
    /// The identity is not proven new.
    #[error("VM {id} destroyed, its identity is not proven: {source}")]
    Identity {
        /// The VM.
        id: String,
        /// Which item, and why.
        source: IdentityFailure,
    },
    /// Its network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The state database.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The key of what is to be restored.
    #[error(transparent)]
    Key(#[from] SealError),
    /// What had changed on the disk.
    #[error(transparent)]
    Disk(#[from] DeltaError),
    /// A file.
    #[error("{what} {path:?}: {source}")]
    File {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
}

#[derive(Debug)]
struct Common {
    id: String,
    identity: Identity,
    timings: Timings,
    db: Db,
    // A paused sandbox's row must survive a failed attempt to bring it back.
    keep_row: bool,
    // The process was started before anybody asked for it.
    spawned_ahead: bool,
    // Somebody waits for it: its steps are fail points.
    awaited: bool,
    // Where it was attached when it was paused.
    attached: Option<Addresses>,
    // Last, here and in all that holds this: a slot is given back when the process is gone.
    network: Option<Lease>,
}

impl Common {
    fn time(&mut self, phase: &str, since: Instant) {
        self.timings.insert(phase.to_owned(), millis(since.elapsed()));
    }

    async fn reached(&self, step: &str) {
        if self.awaited {
            failpoint::reached(step).await;
        }
    }

    /// Forgets a VM that was given up.
    async fn forget(&self) -> Result<(), DbError> {
        if self.keep_row { Ok(()) } else { self.db.vm_gone(&self.id).await }
    }

    fn agent_error(&self, step: &'static str, source: AgentError) -> RestoreError {
        RestoreError::Agent { id: self.id.clone(), step, source }
    }
}

pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> RestoreError {
    let path = path.to_owned();
    move |source| RestoreError::File { what, path, source }
}

/// A VMM process that has loaded nothing.
#[derive(Debug)]
pub struct Spawned {
    shell: Box<dyn Shell>,
    dir: RunDir,
    common: Common,
}

/// A VM with the template's memory, paused.
pub struct Loaded {
    vm: Arc<dyn Vm>,
    dir: RunDir,
    common: Common,
}

/// A VM that runs, still with the template's identity.
pub struct Resumed {
    machine: Machine,
    common: Common,
}

/// A VM that runs and whose identity is proven to be its own.
#[derive(Debug)]
pub struct Reidentified {
    /// Its id.
    pub id: String,
    /// The machine.
    pub machine: Machine,
    /// Its identity, and what the guest reported.
    pub identity: StoredIdentity,
    /// Phases so far.
    pub timings: Timings,
    // Held so that no code path makes this type without one.
    _proof: ProvenIdentity,
}

impl Spawned {
    /// Writes the intent, makes the VM's directory and disk, and starts its VMM process.
    pub async fn spawn(
        context: &RestoreContext,
        template: &ReadyTemplate,
        priority: Priority,
    ) -> Result<Self, RestoreError> {
        let id = ids::new_id();
        let started = Instant::now();
        context.db.vm_starting(&id, &template.name, &template.snapshot).await?;
        let common = Common {
            identity: Identity::mint(&id),
            id: id.clone(),
            timings: Timings::new(),
            db: context.db.clone(),
            keep_row: false,
            spawned_ahead: false,
            awaited: priority == Priority::Normal,
            attached: None,
            network: None,
        };
        common.reached("restore.noted").await;
        match Self::start(context, template, priority, common, started).await {
            Ok(spawned) => Ok(spawned),
            Err(e) => {
                context.db.vm_gone(&id).await?;
                Err(e)
            }
        }
    }

    /// Starts the VMM process of a paused sandbox, which is in the database and has an identity, on
    /// the network that it was `attached` to where that is free.
    pub async fn respawn(
        context: &RestoreContext,
        source: &ReadyTemplate,
        id: &str,
        identity: Identity,
        attached: Option<Addresses>,
    ) -> Result<Self, RestoreError> {
        let common = Common {
            id: id.to_owned(),
            identity,
            timings: Timings::new(),
            db: context.db.clone(),
            keep_row: true,
            spawned_ahead: false,
            awaited: false,
            attached,
            network: None,
        };
        Self::start(context, source, Priority::Normal, common, Instant::now()).await
    }

    async fn start(
        context: &RestoreContext,
        template: &ReadyTemplate,
        priority: Priority,
        mut common: Common,
        started: Instant,
    ) -> Result<Self, RestoreError> {
        let dir =
            RunDir::create(&context.run, &common.id).map_err(file("cannot make", &context.run))?;
        let disk = Disk::of(template, dir.scratch(), Arc::clone(&context.keys));
        let disk = async {
            let made = tokio::task::spawn_blocking(move || disk.make()).await;
            (made, started.elapsed())
        };
        let lease = async {
            let Some(network) = &context.network else { return Ok(None) };
            let since = Instant::now();
            let lease = network.take(&common.identity.mac, common.attached.as_ref()).await?;
            Ok::<_, RestoreError>(Some((lease, since.elapsed())))
        };
        let ((made, disk_time), lease) = tokio::join!(disk, lease);
        let vmstate_key = match made {
            Ok(made) => made?,
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        };
        common.timings.insert("disk".to_owned(), millis(disk_time));
        let mut nic = Nic { tap: None, netns: None };
        if let Some((lease, took)) = lease? {
            let (tap, netns) = lease.nic();
            nic = Nic { tap: Some(tap), netns };
            common.network = Some(lease);
            common.timings.insert("network".to_owned(), millis(took));
        }
        let spec = RestoreSpec {
            id: common.id.clone(),
            run_dir: dir.path().to_owned(),
            vmstate: template.vmstate.clone(),
            vmstate_key,
            memory: context.memory(template),
            memory_file: template.memory_file.clone(),
            backend: context.backend(template),
            root_disk: template.root_disk.clone(),
            scratch_disk: dir.scratch(),
            size: template.size,
            nic,
            background: priority == Priority::Background,
        };
        let shell = context.driver.prepare(&spec).await?;
        context.db.vm_spawned(&shell.record(), &common.identity).await?;
        Ok(Self { shell, dir, common })
    }

    /// What identifies its process.
    pub fn record(&self) -> VmRecord {
        self.shell.record()
    }

    /// The rest of the way, timed from `started`. With an owner, the identity's round trip hands
    /// the VM over, too.
    pub async fn finish(
        self,
        started: Instant,
        owner: Option<&Owner>,
    ) -> Result<Reidentified, RestoreError> {
        let awaited = self.common.awaited;
        if let Some(owner) = owner {
            // Before the guest runs.
            if let Err(e) = self.set_policy(&owner.network).await {
                self.discard().await;
                return Err(e);
            }
        }
        self.common.reached("restore.spawned").await;
        let loaded = self.load().await?;
        loaded.common.reached("restore.loaded").await;
        let resumed = loaded.resume().await?;
        resumed.common.reached("restore.running").await;
        let mut done = resumed.reidentify(owner).await?;
        if awaited {
            failpoint::reached("restore.identified").await;
        }
        let elapsed = started.elapsed();
        done.timings.insert("restore".to_owned(), millis(elapsed));
        live::took(Series::Restore, elapsed);
        record_phases(&done.timings);
        metrics::counter!("rethaw_identity_total", "outcome" => "proven").increment(1);
        Ok(done)
    }

    /// Sets what it may reach.
    pub async fn set_policy(&self, policy: &Policy) -> Result<(), RestoreError> {
        match &self.common.network {
            Some(lease) => Ok(lease.rules().set_policy(policy).await?),
            None => Ok(()),
        }
    }

    /// Somebody waits for it from now on. Its start is nobody's wait any more.
    pub fn wanted(&mut self) {
        self.shell.set_priority(Priority::Normal);
        self.common.timings.clear();
        self.common.spawned_ahead = true;
        self.common.awaited = true;
    }

    /// Gives it up.
    pub async fn discard(self) {
        let Self { shell, dir, common } = self;
        drop((shell, dir));
        if let Err(e) = common.forget().await {
            tracing::error!(vm = %common.id, "{e}");
        }
    }

    /// Loads the template's device state.
    pub async fn load(self) -> Result<Loaded, RestoreError> {
        let Self { shell, dir, mut common } = self;
        match shell.load().await {
            Ok((vm, phases)) => {
                for (phase, took) in phases {
                    if phase == "spawn" && common.spawned_ahead {
                        continue;
                    }
                    common.timings.insert(phase.to_owned(), millis(took));
                }
                Ok(Loaded { vm: Arc::from(vm), dir, common })
            }
            Err(e) => {
                drop(dir);
                common.forget().await?;
                Err(e.into())
            }
        }
    }
}

impl Loaded {
    /// Lets the guest run and connects to its agent.
    pub async fn resume(self) -> Result<Resumed, RestoreError> {
        let Self { vm, dir, mut common } = self;
        let attempt = async {
            let started = Instant::now();
            vm.resume().await?;
            common.time("resume", started);
            let started = Instant::now();
            let agent = vm.connect_agent(AGENT_DEADLINE).await;
            let agent = agent.map_err(|e| common.agent_error("first connection", e))?;
            common.time("agent", started);
            Ok(agent)
        };
        match attempt.await {
            Ok(agent) => {
                let network = common.network.take();
                Ok(Resumed { machine: Machine::new(vm, agent, dir, network), common })
            }
            Err(e) => {
                vm.kill().await;
                drop((vm, dir));
                common.forget().await?;
                Err(e)
            }
        }
    }
}

impl Resumed {
    /// Gives the guest its identity and demands proof.
    pub async fn reidentify(self, owner: Option<&Owner>) -> Result<Reidentified, RestoreError> {
        let Self { machine, mut common } = self;
        let started = Instant::now();
        // Made here and not earlier: the clock in it must be now.
        let request = common.identity.request(owner, machine.addresses());
        let attempt = async {
            let report = machine.agent.identity(&request, IDENTITY_DEADLINE).await;
            let report = report.map_err(|e| common.agent_error("identity", e))?;
            report
                .prove(&request)
                .map_err(|source| RestoreError::Identity { id: common.id.clone(), source })
        };
        match attempt.await {
            Ok(proof) => {
                common.time("identity", started);
                let guest = proof.report().total_micros as f64 / 1e3;
                common.timings.insert("identity_guest".to_owned(), guest);
                let items = identity::item_views(&proof);
                let identity = StoredIdentity { values: common.identity, items };
                let (id, timings) = (common.id, common.timings);
                Ok(Reidentified { id, machine, identity, timings, _proof: proof })
            }
            Err(e) => {
                if matches!(e, RestoreError::Identity { .. }) {
                    metrics::counter!("rethaw_identity_total", "outcome" => "failed").increment(1);
                }
                tracing::error!(vm = %common.id, "{e}");
                machine.destroy().await;
                common.forget().await?;
                Err(e)
            }
        }
    }

    /// Brings back a paused sandbox: new random numbers, clock and token, the identity it had.
    pub async fn revive(
        self,
        request: &ResumeRequest,
        deadline: Duration,
    ) -> Result<(Machine, Timings), RestoreError> {
        let Self { machine, mut common } = self;
        let started = Instant::now();
        let mac = &common.identity.mac;
        let network = machine.addresses().map(|addresses| addresses.for_guest(mac));
        let request = ResumeRequest { network, ..request.clone() };
        match machine.agent.resume(&request, deadline).await {
            Ok(_) => {
                common.time("revive", started);
                Ok((machine, common.timings))
            }
            Err(source) => {
                let e = common.agent_error("resume", source);
                machine.destroy().await;
                common.forget().await?;
                Err(e)
            }
        }
    }
}

/// The whole way from a template to a running VM with an identity of its own, while somebody waits.
pub async fn restore(
    context: &RestoreContext,
    template: &ReadyTemplate,
    owner: Option<&Owner>,
) -> Result<Reidentified, RestoreError> {
    let started = Instant::now();
    let spawned = Spawned::spawn(context, template, Priority::Normal).await?;
    spawned.finish(started, owner).await
}

fn record_phases(timings: &Timings) {
    for (phase, ms) in timings {
        metrics::histogram!("rethaw_restore_phase_duration_seconds", "phase" => phase.clone())
            .record(ms / 1e3);
    }
}
