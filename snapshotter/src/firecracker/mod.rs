//! The Firecracker driver: jailed microVMs, on hosts whose KVM really works.
//!
//! One VM is one process in a home of its own ([`home`]), by default a jail: a user id that nothing
//! else runs as, a chroot, control groups, the network namespace of its tap, and Firecracker's own
//! seccomp filters. What it may read and write is linked into the home under fixed names.
//!
//! ```text
//!   prepare   home made, process started, API answers      (a pool keeps these)
//!   load      PUT /snapshot/load  ||  handshake accepted, memory at the page server
//!   resume    PATCH /vm
//!   kill      SIGKILL, home and control groups removed
//! ```
//!
//! The load and the handshake happen at the same time: Firecracker reads guest memory while it
//! loads, so it waits for the page server in the middle of the call.

pub mod api;
mod binaries;
mod boot;
mod cgroup;
mod home;
pub mod kvm;
mod restore;
mod snapshot;
mod spawn;
mod uids;
pub mod version;
mod vm;
pub mod vsock;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use uffd_handler::supervisor::Supervisor;

pub use binaries::{Binaries, BinariesError, Identity};
pub use cgroup::{Cgroups, Controller};

use crate::host::{self, Accelerator};
use crate::vmm::{BootSpec, Compat, Driver, RestoreSpec, Shell, Vm, VmRecord, VmmError, VmmKind};
use api::{CpuTemplate, RateLimiter};
use uids::UidPool;

const VMM: &str = "firecracker";

/// The NIC's name in the API.
const NIC: &str = "eth0";
/// The writable disk's name in the API.
const SCRATCH: &str = "scratch";

/// How long Firecracker may take for a call that does not touch guest memory: it answers in well
/// under a millisecond.
const COMMAND_DEADLINE: Duration = Duration::from_secs(5);
/// How long a process may take until its API answers; jails get slow when many are made at once.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// How long a snapshot may take to load, page faults of Firecracker's own included.
const LOAD_DEADLINE: Duration = Duration::from_secs(15);
/// How long a killed process may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// How VMs are confined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JailConfig {
    /// Control group that holds one of each VM's.
    pub cgroup_parent: String,
}

impl Default for JailConfig {
    fn default() -> Self {
        Self { cgroup_parent: "rethaw".to_owned() }
    }
}

/// Limits on what a guest's devices may do. A snapshot remembers those of the VM it was made of, so
/// the ones given here are set again after each load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Of the writable disk.
    pub disk: Option<RateLimiter>,
    /// Of what the guest receives.
    pub network_rx: Option<RateLimiter>,
    /// Of what the guest sends.
    pub network_tx: Option<RateLimiter>,
}

/// What the driver is to do, and with what.
#[derive(Debug, Clone)]
pub struct FirecrackerConfig {
    /// The programs.
    pub binaries: Binaries,
    /// Confines VMs; `None` is for development only.
    pub jail: Option<JailConfig>,
    /// Hides CPU features at boot.
    pub cpu_template: Option<CpuTemplate>,
    /// Limits on devices.
    pub limits: Limits,
    /// Lets restored VMs be snapshotted again (before Firecracker 1.13 only so).
    pub track_dirty_pages: bool,
    /// Boots VMs on pages of 2 MiB, which the host must have reserved. What is made of such a VM can be
    /// restored by the page server only.
    pub huge_pages: bool,
    /// Keeps the serial output of restored VMs too, in `console.log`. It has no bound.
    pub restored_console: bool,
}

impl FirecrackerConfig {
    /// Jailed, without limits, and ready for snapshots of restored VMs.
    pub fn new(binaries: Binaries) -> Self {
        Self {
            binaries,
            jail: Some(JailConfig::default()),
            cpu_template: None,
            limits: Limits::default(),
            track_dirty_pages: true,
            huge_pages: false,
            restored_console: false,
        }
    }
}

/// The driver.
#[derive(Debug)]
pub struct Firecracker {
    config: FirecrackerConfig,
    identity: Identity,
    compat: Compat,
    cgroups: Cgroups,
    uids: UidPool,
    pager: Arc<Supervisor>,
}

impl Firecracker {
    /// Asks the binary what it is, refuses versions that are not supported, and looks at the host.
    /// Whether KVM works here is [`kvm::probe`]'s question.
    pub async fn new(config: FirecrackerConfig, pager: Arc<Supervisor>) -> Result<Self, VmmError> {
        if config.jail.is_some() && !rustix::process::geteuid().is_root() {
            return Err(VmmError::Unsupported(
                "jailed Firecracker needs root: to make device nodes, users and control groups"
                    .to_owned(),
            ));
        }
        let identity = config.binaries.identify().await;
        let identity = identity.map_err(|e| VmmError::Unsupported(e.to_string()))?;
        let mut facts = host::facts(Accelerator::Kvm);
        facts.insert("vmm_version".to_owned(), identity.version.to_string());
        facts.insert("snapshot_format".to_owned(), identity.snapshot_format.clone());
        facts.insert("machine".to_owned(), "virtio-mmio".to_owned());
        let compat = Compat { vmm: VmmKind::Firecracker, facts };
        let cgroups = if config.jail.is_some() { Cgroups::detect() } else { Cgroups::None };
        if config.jail.is_some() && cgroups == Cgroups::None {
            tracing::warn!("no control groups on this host: jails do without");
        }
        Ok(Self { config, identity, compat, cgroups, uids: UidPool::new(), pager })
    }

    /// What the binary is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
}

#[async_trait]
impl Driver for Firecracker {
    fn kind(&self) -> VmmKind {
        VmmKind::Firecracker
    }

    fn compat(&self) -> &Compat {
        &self.compat
    }

    async fn boot(&self, spec: &BootSpec) -> Result<Box<dyn Vm>, VmmError> {
        Ok(Box::new(boot::boot(self, spec).await?))
    }

    async fn prepare(&self, spec: &RestoreSpec) -> Result<Box<dyn Shell>, VmmError> {
        Ok(Box::new(restore::prepare(self, spec).await?))
    }

    async fn adopt(&self, record: &VmRecord) -> Result<Box<dyn Vm>, VmmError> {
        Ok(Box::new(vm::adopt(self, record).await?))
    }
}
