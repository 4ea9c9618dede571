//! What host and guest say to each other: JSON bodies of the agent's HTTP/2 endpoints.
//!
//! Unknown fields are ignored and optional ones may be absent, so that an agent frozen into an old
//! template and a newer host understand each other.

mod error;
mod exec;
mod files;
mod identity;
mod lint;
mod payload;

pub use error::{ErrorBody, codes};
pub use exec::{
    ExecExit, ExecFrame, ExecInput, ExecRequest, Keepalive, ProcessInfo, ProcessList, PtySize,
    SignalRequest, Started, StdinRequest,
};
pub use files::{
    DirEntries, DirEntry, EntryKind, MkdirRequest, MoveRequest, Usage, UserInfo, WatchEvent,
    WatchEvents, WatchKind, WatchRequest, WatcherId,
};
pub use identity::{
    ITEMS, IdentityFailure, IdentityItem, IdentityReport, IdentityRequest, Ipv4Config, Ipv6Config,
    NetworkSettings, ProvenIdentity, REQUIRED_ITEMS,
};
pub use lint::{LintFinding, LintReport};
pub use payload::{Base64, Chunk, Encoding};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Name of the virtio-serial port that carries the agent's stream under QEMU.
pub const PORT_NAME: &str = "rethaw.agent";
/// Port the agent listens on where the VM has a vsock device.
pub const VSOCK_PORT: u32 = 7000;
/// Header with the service's name for what it was asked itself; the agent logs it.
pub const REQUEST_ID: &str = "x-request-id";

/// What the agent will do for a caller right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentState {
    /// Commands and files are served.
    Live,
    /// Settled for a template snapshot: only an identity brings it back.
    Settled,
    /// Frozen for a pause: a resume (or, in a fork, an identity) brings it back.
    Frozen,
    /// An identity item failed: nothing brings it back, the VM is to be destroyed.
    IdentityFailed,
}

/// Answer to `GET /health`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// Version of the agent.
    pub version: String,
    /// Generation of the identity last applied; absent in a VM that was never restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<String>,
    /// What the agent will do now.
    pub state: AgentState,
    /// Seconds of guest run time (CLOCK_BOOTTIME).
    pub uptime_seconds: f64,
    /// Commands running.
    pub processes: u32,
}

/// Answer to `GET /boot` and `POST /boot/wait`: how the guest's boot went, from systemd itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BootReport {
    /// `systemctl is-system-running`: `running`, `degraded`, `starting`, ...
    pub system_state: String,
    /// Jobs still queued in systemd.
    pub pending_jobs: u32,
    /// Units that failed.
    #[serde(default)]
    pub failed_units: Vec<String>,
    /// Kernel start to first userspace, in microseconds.
    pub kernel_micros: u64,
    /// First userspace (systemd) to the end of the boot, in microseconds; 0 until it has ended.
    pub userspace_micros: u64,
    /// Kernel start to the end of the boot, in microseconds; 0 until it has ended.
    pub finished_micros: u64,
    /// Kernel release, as `uname -r` says.
    pub kernel_release: String,
}

/// Body of `POST /boot/wait`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BootWaitRequest {
    /// Longest wait in the guest; the answer is 408 `boot_timeout` after it.
    pub timeout_seconds: f64,
}

/// Body of `POST /settle`: make the guest ready to become a template.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct SettleRequest {
    /// Drop the page cache as well: smaller snapshot, slower first reads.
    pub drop_caches: bool,
    /// Empty journals, caches of the package manager and temporary folders.
    pub vacuum: bool,
}

impl Default for SettleRequest {
    fn default() -> Self {
        Self { drop_caches: false, vacuum: true }
    }
}

/// Answer to `POST /settle` and `POST /freeze`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SettleReport {
    /// State the agent is in now.
    pub state: AgentState,
    /// Files and folders that were removed.
    #[serde(default)]
    pub removed: Vec<String>,
    /// Processes in the frozen workload.
    pub frozen_processes: u32,
    /// Time it took in the guest.
    pub total_micros: u64,
}

/// Body of `POST /freeze`: hold the workload still for a pause or a fork.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct FreezeRequest {
    /// Write dirty data to the disk first, so that disk and memory can be kept apart.
    pub sync: bool,
}

impl Default for FreezeRequest {
    fn default() -> Self {
        Self { sync: true }
    }
}

/// Body of `POST /claim`: hand a parked VM to its user.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ClaimRequest {
    /// The host's clock when this was sent, nanoseconds since 1970.
    pub wall_clock_unix_nanos: u64,
    /// Token the sandbox's user shows; kept in `/run/rethaw/access-token`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// Environment every later command starts with.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
}

/// Answer to `POST /claim`, `/clock` and `/resume`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClaimReport {
    /// Generation of the identity the guest has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<String>,
    /// How far off the guest's clock was before it was set: guest minus host.
    pub clock_error_nanos: i64,
    /// Clock read back minus the time that was set: the part of the error the guest itself adds.
    pub clock_residual_nanos: i64,
    /// Time it took in the guest.
    pub total_micros: u64,
}

/// Body of `POST /clock`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ClockRequest {
    /// The host's clock when this was sent, nanoseconds since 1970.
    pub wall_clock_unix_nanos: u64,
}

/// Body of `POST /resume`: a paused sandbox runs again, with the identity it had.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ResumeRequest {
    /// Fresh random bytes from the host (64): its random numbers must not repeat what the paused
    /// memory would have produced.
    pub entropy: Base64,
    /// The host's clock when this was sent, nanoseconds since 1970.
    pub wall_clock_unix_nanos: u64,
    /// New access token, when it changes with the resume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// Environment added to the default one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The network it is attached to now, when that is another one: its connections are closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkSettings>,
}
