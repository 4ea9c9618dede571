//! The service's side: keeps a page server running and every VM served.
//!
//! ```text
//! no pager --start--> serving --pager dies--> taking over --all VMs handed on--> serving
//! pager left by an earlier service --start--> adopting --descriptors taken back--> serving
//! ```
//!
//! The supervisor holds a second descriptor of everything a page server needs. When that process
//! dies, a new one is started and handed the lot; the guests' threads that waited ask again, and
//! all they notice is the time it took.

mod launch;
mod link;
mod monitor;
mod plan;
mod recovery;
mod table;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

pub use launch::StartError;
pub use plan::{MemoryPlan, PlanError};

use crate::control::{Reply, Request};
use crate::handshake::Handshake;
use crate::seal::{Key, KeySource, NoKeys, SealError};
use crate::source::{MemoryLayers, OpenLayer, SourceError};
use crate::stats::Stats;
use crate::working_set::WorkingSet;
use link::RequestError;
use monitor::Shared;

/// How the page server is started and watched.
#[derive(Clone, Debug)]
pub struct SupervisorConfig {
    /// The `rethaw-pager` binary.
    pub binary: PathBuf,
    /// Its control socket; only its owner can connect.
    pub socket: PathBuf,
    /// Where its log goes; this process's standard error when there is none.
    pub log: Option<PathBuf>,
    /// Its log filter.
    pub log_level: String,
    /// How long it stays when it has neither a VM nor a service.
    pub idle_exit: Duration,
    /// How long it may take to start, and to answer a request.
    pub deadline: Duration,
    /// How often a sign of life is asked for. A page server that owes one for as long is killed
    /// and replaced.
    pub heartbeat: Duration,
    /// How long it waits for a guest's next fault without sleeping, within limits; zero always
    /// sleeps.
    pub spin: Duration,
    /// A private directory on a file system in memory, from which VMs are recovered when service
    /// and page server were both killed. Without one such VMs stand still unnoticed.
    pub state_dir: Option<PathBuf>,
    /// Where the keys of encrypted layers are found.
    pub keys: Arc<dyn KeySource>,
    /// Names the request of a user that the caller works for, if there is one, for the page server's
    /// log.
    pub request: fn() -> Option<String>,
}

impl SupervisorConfig {
    /// The usual settings for a binary and a socket.
    pub fn new(binary: impl Into<PathBuf>, socket: impl Into<PathBuf>) -> Self {
        Self {
            binary: binary.into(),
            socket: socket.into(),
            log: None,
            log_level: "info".into(),
            idle_exit: Duration::from_secs(30),
            deadline: Duration::from_secs(5),
            heartbeat: Duration::from_secs(1),
            spin: Duration::from_micros(100),
            state_dir: None,
            keys: Arc::new(NoKeys),
            request: || None,
        }
    }
}

/// What happens to VMs and page servers unasked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PagerEvent {
    /// The VMM ended; the page server and the supervisor have freed everything about it.
    VmGone {
        /// Which.
        id: String,
    },
    /// The VM cannot be served. It stands still until the service kills it; then call
    /// [`Supervisor::remove_vm`].
    VmLost {
        /// Which.
        id: String,
        /// Why.
        reason: String,
    },
    /// Every page of the VM is in place.
    Graduated {
        /// Which.
        id: String,
    },
    /// A page server died and another one took over.
    PagerRestarted {
        /// The new process.
        pid: i32,
        /// VMs handed over.
        vms: usize,
        /// From noticing the death to the last VM handed over.
        millis: u64,
    },
    /// No page server can be started; every VM stands still. Trying goes on.
    PagerUnavailable {
        /// Why.
        reason: String,
    },
}

/// Why a VM is not served.
#[derive(Debug, Error)]
pub enum AddVmError {
    /// There is one of that name.
    #[error("VM {0} is served already")]
    Duplicate(String),
    /// The files of the plan cannot be used.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The page server refused.
    #[error("page server refused VM {id}: {reason}")]
    Refused {
        /// Which.
        id: String,
        /// Its reason.
        reason: String,
    },
    /// No page server took it in time.
    #[error("no page server took VM {id} within {deadline:?}")]
    Unavailable {
        /// Which.
        id: String,
        /// How long was waited.
        deadline: Duration,
    },
}

/// A question about a VM that is not served.
#[derive(Debug, Error)]
#[error("no VM {0} is being served")]
pub struct UnknownVm(pub String);

/// Why the layers of a VM's memory cannot be opened anew.
#[derive(Debug, Error)]
pub enum LayersError {
    /// Nobody serves it.
    #[error(transparent)]
    Unknown(#[from] UnknownVm),
    /// A file of theirs.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A key of theirs.
    #[error(transparent)]
    Key(#[from] SealError),
    /// No more descriptors.
    #[error("descriptors of a VM's memory: {0}")]
    Descriptors(#[from] std::io::Error),
}

/// Keeps a page server running; see the [module](self).
#[derive(Debug)]
pub struct Supervisor {
    shared: Arc<Shared>,
    adopted: Vec<String>,
    lost_at_start: Vec<(String, String)>,
    monitor: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Supervisor {
    /// Connects to the page server that an earlier service left behind and takes its VMs back, or
    /// starts a new one.
    pub fn start(config: SupervisorConfig) -> Result<Self, StartError> {
        let (shared, first) = Shared::begin(config)?;
        let shared = Arc::new(shared);
        let adopted = shared.table().ids();
        let lost_at_start = first.lost();
        let run = shared.clone();
        let monitor = std::thread::Builder::new()
            .name("pager-monitor".into())
            .spawn(move || monitor::run(&run, first))
            .map_err(StartError::Thread)?;
        Ok(Self { shared, adopted, lost_at_start, monitor: Mutex::new(Some(monitor)) })
    }

    /// VMs that were taken back: from an earlier service's page server, or from their VMMs when both
    /// were killed. Lost ones are among them where the page server knew them.
    pub fn adopted(&self) -> Vec<String> {
        self.adopted.clone()
    }

    /// VMs of an earlier service that cannot be served any more, and why: kill them. (Events about
    /// them came before anybody could subscribe.)
    pub fn lost_at_start(&self) -> Vec<(String, String)> {
        self.lost_at_start.clone()
    }

    /// Has a VM served from now on.
    pub fn add_vm(
        &self,
        id: &str,
        handshake: Handshake,
        plan: &MemoryPlan,
    ) -> Result<(), AddVmError> {
        if self.shared.table().state(id).is_some() {
            return Err(AddVmError::Duplicate(id.into()));
        }
        let vm = plan::prepare(id, handshake, plan, &self.shared.config)?;
        let deadline = self.shared.config.deadline;
        let end = Instant::now() + deadline;
        let generation = self.shared.generation();
        let request = Request::AddVm(vm.registration.clone());
        let sent = {
            let mut table = self.shared.table();
            if !table.insert(vm) {
                return Err(AddVmError::Duplicate(id.into()));
            }
            // Sent with the table held: a takeover sees the VM either not at all or once sent.
            self.shared.send(request, &table.descriptors(id))
        };
        let outcome = sent.and_then(|pending| pending.wait(end));
        match outcome {
            Ok((Reply::Failed { message }, _)) => {
                self.shared.table().remove(id);
                Err(AddVmError::Refused { id: id.into(), reason: message })
            }
            Ok(_) => Ok(()),
            // The takeover hands on whatever is in the table, this VM too.
            Err(RequestError::Disconnected) if self.shared.wait_restart(generation, end) => {
                match self.shared.table().lost(id) {
                    None => Ok(()),
                    Some(reason) => {
                        self.shared.table().remove(id);
                        Err(AddVmError::Refused { id: id.into(), reason })
                    }
                }
            }
            Err(_) => {
                self.remove_vm(id);
                Err(AddVmError::Unavailable { id: id.into(), deadline })
            }
        }
    }

    /// Stops serving a VM and frees everything about it. A VM that still runs stands still at its
    /// next missing page: kill it first.
    pub fn remove_vm(&self, id: &str) {
        if self.shared.table().remove(id) {
            let end = Instant::now() + self.shared.config.deadline;
            let request =
                Request::RemoveVm { id: id.into(), request: (self.shared.config.request)() };
            // A page server that is gone has forgotten the VM by itself.
            if let Err(error) = self.shared.send(request, &[]).and_then(|reply| reply.wait(end)) {
                tracing::debug!(vm = id, %error, "removing");
            }
        }
    }

    /// Notes, in the page server's log too, that a VM made ahead is now used for the caller's request.
    /// Nothing is waited for.
    pub fn claim(&self, id: &str) {
        let Some(request) = (self.shared.config.request)() else { return };
        // With the table held, as in add_vm: a takeover hands the name on, or it is sent after it.
        let mut table = self.shared.table();
        if table.claim(id, &request) {
            let told = self.shared.send(Request::Claim { id: id.into(), request }, &[]);
            // A page server that is gone: the next one finds it in the registration.
            if let Err(error) = told {
                tracing::debug!(vm = id, %error, "telling the page server of a claim");
            }
        }
    }

    /// Has all pages of a VM put in place in the background, after which it needs no page server any
    /// more: [`PagerEvent::Graduated`] says when. Right for a VM that lives long; every page costs
    /// memory.
    pub fn graduate(&self, id: &str) -> Result<(), UnknownVm> {
        let sent = {
            let mut table = self.shared.table();
            if !table.graduate(id) {
                return Err(UnknownVm(id.into()));
            }
            self.shared.send(Request::Graduate { id: id.into() }, &[])
        };
        // A page server that is gone: the next one finds it in the registration.
        let end = Instant::now() + self.shared.config.deadline;
        match sent.and_then(|reply| reply.wait(end)) {
            Ok((Reply::Failed { message }, _)) => {
                tracing::warn!(vm = id, message, "graduating");
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(vm = id, %error, "graduating"),
        }
        Ok(())
    }

    /// VMs being served, lost ones included.
    pub fn vms(&self) -> Vec<String> {
        self.shared.table().ids()
    }

    /// What a VM's memory was restored from, opened anew: the very files it is served from, whatever
    /// became of their names.
    pub fn memory_layers(&self, id: &str) -> Result<MemoryLayers, LayersError> {
        let (registration, fds) =
            self.shared.table().attached(id).ok_or_else(|| UnknownVm(id.into()))??;
        let mut fds = fds.into_iter();
        let mut layers = Vec::new();
        for layer in &registration.layers {
            let files = fds.by_ref().take(layer.paths().len()).map(std::fs::File::from).collect();
            let key = match layer.key().and_then(|_| fds.next()) {
                Some(fd) => Some(Key::from_descriptor(fd.as_fd())?),
                None => None,
            };
            let memory_bytes = registration.memory_bytes;
            layers.push(OpenLayer::from_files(layer, files, key.as_ref(), memory_bytes)?);
        }
        Ok(MemoryLayers::new(layers)?)
    }

    /// Ends the recording of a VM's demand faults and gives the pages.
    pub fn recording(&self, id: &str) -> Result<WorkingSet, UnknownVm> {
        let state = self.shared.table().state(id).ok_or_else(|| UnknownVm(id.into()))?;
        Ok(WorkingSet::from_bitmap(state.stop_recording()))
    }

    /// Counts of one VM.
    pub fn vm_stats(&self, id: &str) -> Result<Stats, UnknownVm> {
        let state = self.shared.table().state(id).ok_or_else(|| UnknownVm(id.into()))?;
        Ok(state.stats())
    }

    /// Counts of all VMs since this supervisor started, the ended ones included.
    pub fn stats(&self) -> Stats {
        self.shared.table().total()
    }

    /// Times that a page server had to be replaced.
    pub fn restarts(&self) -> u64 {
        self.shared.generation()
    }

    /// Waits until a VM's working set is in place; false when that takes longer.
    pub fn wait_prefetched(&self, id: &str, timeout: Duration) -> Result<bool, UnknownVm> {
        let state = self.shared.table().state(id).ok_or_else(|| UnknownVm(id.into()))?;
        Ok(state.wait_prefetched(timeout))
    }

    /// Whether every page of the VM is in place and it needs no page server any more.
    pub fn is_graduated(&self, id: &str) -> Result<bool, UnknownVm> {
        let state = self.shared.table().state(id).ok_or_else(|| UnknownVm(id.into()))?;
        Ok(state.is_graduated())
    }

    /// A new subscription to what happens from now on.
    pub fn events(&self) -> Receiver<PagerEvent> {
        let (sender, receiver) = channel();
        self.shared.subscribe(sender);
        receiver
    }

    /// Process id of the page server; 0 while there is none.
    pub fn pager_pid(&self) -> i32 {
        self.shared.pager_pid()
    }

    /// Replaces the page server, as after an upgrade of its binary; VMs are handed over.
    pub fn replace_pager(&self) {
        self.shared.kill_pager();
    }

    /// Ends the page server. Only for when all VMs are gone: one that is left stands still.
    pub fn shutdown(&self) {
        self.shared.expect_end();
        let end = Instant::now() + self.shared.config.deadline;
        let asked = self.shared.send(Request::Shutdown, &[]).and_then(|reply| reply.wait(end));
        if let Err(error) = asked {
            tracing::debug!(%error, "ending the page server");
        }
        self.shared.reap(end);
        // Nobody listens there any more; the next page server makes its own.
        if let Err(error) = std::fs::remove_file(&self.shared.config.socket)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "removing the page server's socket");
        }
        // Only when it is empty: what is left of a VM is for the next service.
        if let Some(dir) = &self.shared.config.state_dir {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

impl Drop for Supervisor {
    /// Lets go of the page server, which serves on.
    fn drop(&mut self) {
        self.shared.stop_monitor();
        let handle = self.monitor.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(handle) = handle
            && handle.join().is_err()
        {
            tracing::error!("the page server's monitor panicked");
        }
    }
}
