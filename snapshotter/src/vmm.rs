//! The contract every VMM driver keeps, and the types that cross it.
//!
//! ```text
//!            boot                      pause, snapshot
//!   Driver ---------> Vm (running) ----------------------> files in a directory
//!     |                                                        |
//!     |  prepare            load              resume           |
//!     +-----------> Shell ---------> Vm (paused) ---> running <+
//! ```
//!
//! A [`Shell`] is a spawned VMM process that has loaded nothing yet: it can wait in a pool. Loading
//! one gives a [`Vm`] that is still paused and whose identity is still its template's; what must
//! happen before anyone may use it is the service's business, not a driver's.
//!
//! Everything above this file is the same for every VMM.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use guest_agent::client::{AgentClient, AgentError};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use uffd_handler::seal::{Key, SealError};

use crate::manifest;
use crate::process::{ExitReason, ProcessError, ProcessId};

/// Which VMM a driver drives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmKind {
    /// QEMU's `microvm` machine.
    Qemu,
    /// Firecracker, jailed or not.
    Firecracker,
}

impl VmmKind {
    /// The name used in the API, in metrics and in manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        }
    }
}

/// All that must be the same when a snapshot is loaded as it was when the snapshot was made.
///
/// Kept as named strings so that a mismatch can be told to the operator as it is:
/// `cpu_flags: snapshot has "...", this host has "..."`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compat {
    /// The VMM that wrote the device state.
    pub vmm: VmmKind,
    /// Facts by name: `vmm_version`, `snapshot_format`, `accelerator`, `cpu_model`, `cpu_flags`,
    /// `host_kernel`, `machine`...
    pub facts: BTreeMap<String, String>,
}

impl Compat {
    /// Every fact that differs, as text for an operator; empty if a restore may go on.
    pub fn differences(&self, here: &Compat) -> Vec<String> {
        let mut out = Vec::new();
        if self.vmm != here.vmm {
            out.push(format!(
                "vmm: snapshot was made by {}, this driver is {}",
                self.vmm.as_str(),
                here.vmm.as_str()
            ));
        }
        for (name, was) in &self.facts {
            let is = here.facts.get(name).map_or("(unknown)", String::as_str);
            if is != was {
                out.push(format!("{name}: snapshot has {was:?}, this host has {is:?}"));
            }
        }
        out
    }
}

/// The size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSize {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in bytes; a multiple of 2 MiB.
    pub memory_bytes: u64,
}

/// The guest's one NIC. The guest agent gives it its own MAC after a restore; what is here is what
/// the device model starts with, and it must not change between snapshot and restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// A tap device that is open to the VMM; `None` leaves the NIC without a cable.
    pub tap: Option<String>,
    /// Network namespace (path) in which the VMM has to run to see the tap.
    pub netns: Option<PathBuf>,
}

/// What to boot.
#[derive(Debug, Clone)]
pub struct BootSpec {
    /// Identifies the VM in paths and logs: `[a-z0-9]{20}`.
    pub id: String,
    /// A directory of this VM's own for sockets and logs; made by the caller, removed by the caller
    /// after [`Vm::kill`].
    pub run_dir: PathBuf,
    /// Uncompressed kernel (ELF).
    pub kernel: PathBuf,
    /// Initramfs, if the kernel needs one.
    pub initrd: Option<PathBuf>,
    /// Kernel command line, without what the driver adds itself.
    pub cmdline: String,
    /// The shared base image, opened read-only.
    pub root_disk: PathBuf,
    /// This VM's writable disk.
    pub scratch_disk: PathBuf,
    /// Where guest memory should be, if the driver can back it by a file: a snapshot then has no
    /// memory to copy. Made by the driver.
    pub memory_file: PathBuf,
    /// Size of the machine.
    pub size: MachineSize,
    /// The NIC.
    pub nic: Nic,
}

/// How a restored VM gets its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryBackend {
    /// Page by page from the page server.
    Uffd,
    /// A private mapping of the memory file; clean pages stay shared in the page cache.
    File,
}

/// What to restore from.
#[derive(Debug, Clone)]
pub struct RestoreSpec {
    /// Identifies the VM in paths and logs.
    pub id: String,
    /// A directory of this VM's own, as in [`BootSpec::run_dir`].
    pub run_dir: PathBuf,
    /// Device state file.
    pub vmstate: PathBuf,
    /// The key that it is encrypted with.
    pub vmstate_key: Option<Key>,
    /// Memory: bottom layer first. The first is a flat file, the others are deltas on it.
    pub memory: uffd_handler::supervisor::MemoryPlan,
    /// Flat memory file for [`MemoryBackend::File`].
    pub memory_file: PathBuf,
    /// Which backend.
    pub backend: MemoryBackend,
    /// The shared base image.
    pub root_disk: PathBuf,
    /// This VM's own copy of the scratch disk of the same instant.
    pub scratch_disk: PathBuf,
    /// Size of the machine; must be the snapshot's.
    pub size: MachineSize,
    /// The NIC.
    pub nic: Nic,
    /// Runs at low priority until [`Vm::set_priority`]: refill must not slow a claim.
    pub background: bool,
}

/// Scheduling weight of a VM's threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Yields to everything else.
    Background,
    /// As any process.
    Normal,
    /// Before every process: while a VM is handed over, and not longer.
    HandOver,
}

/// Enough to find a VM's process and sockets again after the service was killed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Identifies the VM.
    pub id: String,
    /// The VMM.
    pub vmm: VmmKind,
    /// The VMM's process.
    pub process: ProcessId,
    /// The VM's directory.
    pub run_dir: PathBuf,
    /// How it gets its memory.
    pub backend: MemoryBackend,
    /// Size of the machine.
    pub size: MachineSize,
    /// Driver's own details (jail, uid...), opaque to others.
    #[serde(default)]
    pub details: BTreeMap<String, String>,
}

/// Writes a device state, encrypted when there is a key. Not synced: publication does that.
pub(crate) fn write_vmstate(path: &Path, state: &[u8], key: Option<&Key>) -> Result<(), VmmError> {
    let sealed = key.map(|key| key.seal(manifest::VMSTATE_PURPOSE, state)).transpose();
    let sealed = sealed.map_err(|source| VmmError::Seal { path: path.to_owned(), source })?;
    std::fs::write(path, sealed.as_deref().unwrap_or(state)).map_err(|source| VmmError::File {
        what: "cannot write",
        path: path.to_owned(),
        source,
    })
}

/// Reads an encrypted device state.
pub(crate) fn read_vmstate(path: &Path, key: &Key) -> Result<Zeroizing<Vec<u8>>, VmmError> {
    let sealed = std::fs::read(path);
    let sealed = sealed.map_err(|source| VmmError::File {
        what: "cannot read",
        path: path.to_owned(),
        source,
    })?;
    let opened = key.open(manifest::VMSTATE_PURPOSE, &sealed);
    opened.map_err(|source| VmmError::Seal { path: path.to_owned(), source })
}

/// How long each step of a restore took, in order: `(phase, duration)`.
pub type Phases = Vec<(&'static str, Duration)>;

/// What a driver wrote for a snapshot; the caller completes, digests and publishes it.
#[derive(Debug, Clone)]
pub struct SnapshotFiles {
    /// Device state.
    pub vmstate: PathBuf,
    /// Memory: either the flat file, or `None` when [`SnapshotFiles::delta`] is set.
    pub memory: Option<PathBuf>,
    /// Memory as a delta on the chain it was restored from: a base name that
    /// `uffd_handler::source` can open.
    pub delta: Option<PathBuf>,
    /// The delta's digest, computed as it was written.
    pub delta_digest: Option<[u8; 32]>,
    /// Steps and their times.
    pub phases: Phases,
}

/// A VMM driver.
#[async_trait]
pub trait Driver: Send + Sync + std::fmt::Debug {
    /// Which VMM.
    fn kind(&self) -> VmmKind;

    /// What a snapshot made or loaded here depends on.
    fn compat(&self) -> &Compat;

    /// Starts a VM from a kernel; it runs when this returns.
    async fn boot(&self, spec: &BootSpec) -> Result<Box<dyn Vm>, VmmError>;

    /// Spawns a VMM process that will load `spec`, and stops before loading.
    async fn prepare(&self, spec: &RestoreSpec) -> Result<Box<dyn Shell>, VmmError>;

    /// Takes back a VM that a killed service left running.
    async fn adopt(&self, record: &VmRecord) -> Result<Box<dyn Vm>, VmmError>;
}

/// A spawned VMM process that has loaded nothing. Dropping one kills its process.
#[async_trait]
pub trait Shell: Send + Sync + std::fmt::Debug {
    /// What identifies the process and its files.
    fn record(&self) -> VmRecord;

    /// Changes the scheduling weight of the VMM's threads.
    fn set_priority(&self, priority: Priority);

    /// Loads the snapshot; the VM is paused when this returns. On failure the process is gone.
    async fn load(self: Box<Self>) -> Result<(Box<dyn Vm>, Phases), VmmError>;
}

/// A virtual machine. Dropping one kills its process, unless [`Vm::leave_running`] was called.
#[async_trait]
pub trait Vm: Send + Sync + std::fmt::Debug {
    /// What identifies the process and its files.
    fn record(&self) -> VmRecord;

    /// Lets the vCPUs run.
    async fn resume(&self) -> Result<(), VmmError>;

    /// The same at the least cost, for a caller that sees by the guest that they run: they may not yet
    /// when this returns.
    async fn let_run(&self) -> Result<(), VmmError> {
        self.resume().await
    }

    /// Stops the vCPUs.
    async fn pause(&self) -> Result<(), VmmError>;

    /// Writes device state and memory into `into`, encrypted when there is a key. The VM must be
    /// paused, and stays so.
    async fn snapshot(&self, into: &Path, key: Option<&Key>) -> Result<SnapshotFiles, VmmError>;

    /// A new connection to the guest agent; whatever the guest remembers of older ones is reset.
    async fn connect_agent(&self, deadline: Duration) -> Result<AgentClient, AgentError>;

    /// Changes the scheduling weight of the VMM's threads.
    fn set_priority(&self, priority: Priority);

    /// Kills the process and waits until it is gone and its page-server registration with it.
    async fn kill(&self);

    /// Resolves when the process is gone.
    async fn exited(&self) -> ExitReason;

    /// From now on dropping this does not kill the process: the service is going away, the VM not.
    fn leave_running(&self);
}

/// Why a VMM could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The process could not be started or died.
    #[error("{vmm} process for VM {id}: {source}{log}")]
    Process {
        /// VMM name.
        vmm: &'static str,
        /// VM.
        id: String,
        /// What happened.
        source: ProcessError,
        /// Last lines of its log, or nothing.
        log: String,
    },
    /// The VMM refused a command, in its own words.
    #[error("{vmm} refused {command} for VM {id}: {message}")]
    Refused {
        /// VMM name.
        vmm: &'static str,
        /// VM.
        id: String,
        /// The command.
        command: String,
        /// The VMM's own text.
        message: String,
    },
    /// A step did not end in time.
    #[error("{vmm} did not finish {step} for VM {id} within {after:?}{log}")]
    Timeout {
        /// VMM name.
        vmm: &'static str,
        /// VM.
        id: String,
        /// The step.
        step: &'static str,
        /// Its deadline.
        after: Duration,
        /// Last lines of its log, or nothing.
        log: String,
    },
    /// The control socket failed.
    #[error("{vmm} control socket of VM {id}: {source}")]
    Control {
        /// VMM name.
        vmm: &'static str,
        /// VM.
        id: String,
        /// What happened.
        source: std::io::Error,
    },
    /// The page server could not take the VM's memory.
    #[error("memory of VM {id}: {message}")]
    Memory {
        /// VM.
        id: String,
        /// What happened.
        message: String,
    },
    /// A file could not be read or written.
    #[error("{what} {path:?}: {source}")]
    File {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// Device state could not be encrypted, or does not open with its key.
    #[error("{path:?}: {source}")]
    Seal {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: SealError,
    },
    /// This driver cannot do it here, and why.
    #[error("{0}")]
    Unsupported(String),
}
