//! The golden VM: cold boot through to systemd, settle, freeze.
//!
//! What comes out is a [`Draft`], not a snapshot yet: the caller tries it (a restore that also
//! records the working set) before it publishes it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_agent::client::{AgentClient, AgentError};
use guest_agent::wire::{BootReport, SettleRequest};
use time::OffsetDateTime;
use uffd_handler::supervisor::MemoryPlan;

use crate::disk;
use crate::image::GuestImage;
use crate::manifest::{
    self, BootTimings, FORMAT, FrozenIdentity, Manifest, SCRATCH, WORKING_SET, ZERO_MAP,
};
use crate::store::{Draft, Store};
use crate::vmm::{BootSpec, Driver, MachineSize, Nic, Vm, VmmError};

/// A kernel that has not brought up the agent by then never will; emulated hosts are slow.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// The guest syncs, and may have a lot to write.
const SETTLE_DEADLINE: Duration = Duration::from_secs(60);

/// How long a settled guest runs on before it is stopped. What settling has stirred up, systemd's new
/// list of mounts for one, is then done once and not in each clone, beside its identity.
pub const QUIET: Duration = Duration::from_millis(400);

/// Where a bake is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The kernel and systemd come up.
    Booting,
    /// Caches written, secrets removed, workload frozen.
    Settling,
    /// Device state, memory and disk are written.
    Snapshotting,
}

/// Why there is no golden VM.
#[derive(Debug, thiserror::Error)]
pub enum BakeError {
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The agent did not come up or refused.
    #[error("golden VM: {step}: {source}{console}")]
    Agent {
        /// What was asked.
        step: &'static str,
        /// What came back.
        source: AgentError,
        /// The end of the guest's console, or nothing.
        console: String,
    },
    /// The guest came up, but not whole.
    #[error("golden VM is {state:?} instead of running; failed units: {}", failed.join(", "))]
    Degraded {
        /// systemd's own word.
        state: String,
        /// Units that failed.
        failed: Vec<String>,
    },
    /// The memory file could not be scanned.
    #[error("zero pages of the golden VM: {0}")]
    ZeroMap(#[from] uffd_handler::sealed_file::SealedFileError),
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

/// What to boot and freeze.
#[derive(Debug)]
pub struct GoldenSpec<'a> {
    /// Id of the snapshot to be.
    pub id: String,
    /// The guest image.
    pub image: &'a GuestImage,
    /// Size of the machine.
    pub size: MachineSize,
    /// A directory of the VM's own; made by the caller and removed by it.
    pub run_dir: &'a Path,
}

/// Boots, settles and freezes a golden VM. The VM is gone when this returns.
pub async fn freeze(
    driver: &dyn Driver,
    store: &Store,
    spec: &GoldenSpec<'_>,
    progress: impl Fn(Step),
) -> Result<(Draft, Manifest), BakeError> {
    let file = |what, path: &Path| {
        let path = path.to_owned();
        move |source| BakeError::File { what, path, source }
    };
    let draft = store.draft(&spec.id).map_err(file("cannot make", spec.run_dir))?;
    let scratch = draft.dir().join(SCRATCH);
    disk::clone_file(&spec.image.scratch, &scratch)
        .map_err(file("cannot copy", &spec.image.scratch))?;
    progress(Step::Booting);
    let started = Instant::now();
    let boot = BootSpec {
        id: spec.id.clone(),
        run_dir: spec.run_dir.to_owned(),
        kernel: spec.image.kernel.clone(),
        initrd: spec.image.initrd.clone(),
        cmdline: spec.image.cmdline.clone(),
        root_disk: spec.image.rootfs.clone(),
        scratch_disk: scratch,
        memory_file: draft.dir().join(manifest::MEMORY),
        size: spec.size,
        nic: Nic { tap: None, netns: None },
    };
    let vm: Arc<dyn Vm> = Arc::from(driver.boot(&boot).await?);
    let done = settle_and_snapshot(&*vm, &draft, spec, started, &progress).await;
    vm.kill().await;
    let (report, mut timings) = done?;
    timings.kernel_ms = report.kernel_micros as f64 / 1e3;
    timings.userspace_ms = report.userspace_micros as f64 / 1e3;
    build_zero_map(&draft)?;
    let manifest = Manifest {
        format: FORMAT,
        id: spec.id.clone(),
        created_at: OffsetDateTime::now_utc(),
        parent: None,
        size: spec.size,
        compat: driver.compat().clone(),
        image: spec.image.key.clone(),
        image_digests: spec.image.digests.clone(),
        files: Default::default(),
        memory_layers: Vec::new(),
        disk_layers: Vec::new(),
        key: None,
        template: true,
        env: Default::default(),
        boot: Some(timings),
        frozen_identity: FrozenIdentity::default(),
    };
    Ok((draft, manifest))
}

async fn settle_and_snapshot(
    vm: &dyn Vm,
    draft: &Draft,
    spec: &GoldenSpec<'_>,
    started: Instant,
    progress: &impl Fn(Step),
) -> Result<(BootReport, BootTimings), BakeError> {
    let agent_error = |step| {
        let console = console_tail(spec.run_dir);
        move |source| BakeError::Agent { step, source, console }
    };
    let agent = first_contact(vm, spec, started).await?;
    let mut timings = BootTimings { agent_ms: ms(started), ..BootTimings::default() };
    let left = BOOT_DEADLINE.saturating_sub(started.elapsed());
    let report = agent.boot_wait(left).await;
    let report = report.map_err(agent_error("waiting for systemd"))?;
    timings.total_ms = ms(started);
    if report.system_state != "running" {
        let (state, failed) = (report.system_state, report.failed_units);
        return Err(BakeError::Degraded { state, failed });
    }
    progress(Step::Settling);
    let since = Instant::now();
    let settled = agent.settle(&SettleRequest::default(), SETTLE_DEADLINE).await;
    settled.map_err(agent_error("settling"))?;
    // The host's end is closed before the freeze: a clone must not remember a connection.
    drop(agent);
    tokio::time::sleep(QUIET).await;
    timings.settle_ms = ms(since);
    progress(Step::Snapshotting);
    let since = Instant::now();
    vm.pause().await?;
    vm.snapshot(draft.dir(), None).await?;
    timings.snapshot_ms = ms(since);
    Ok((report, timings))
}

/// The agent answers as soon as its unit runs; a guest that dies on the way says so on its console.
async fn first_contact(
    vm: &dyn Vm,
    spec: &GoldenSpec<'_>,
    started: Instant,
) -> Result<AgentClient, BakeError> {
    let left = BOOT_DEADLINE.saturating_sub(started.elapsed());
    tokio::select! {
        agent = vm.connect_agent(left) => agent.map_err(|source| BakeError::Agent {
            step: "first contact",
            source,
            console: console_tail(spec.run_dir),
        }),
        reason = vm.exited() => Err(BakeError::Agent {
            step: "first contact",
            source: AgentError::Protocol(format!("the VMM process {reason} during the boot")),
            console: console_tail(spec.run_dir),
        }),
    }
}

fn console_tail(run_dir: &Path) -> String {
    let text = std::fs::read(run_dir.join("console.log")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut lines: Vec<&str> =
        text.lines().rev().filter(|l| !l.trim().is_empty()).take(6).collect();
    lines.reverse();
    if lines.is_empty() {
        return String::new();
    }
    format!("; the guest's console ends with: {}", lines.join(" | "))
}

fn ms(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e6).round() / 1e3
}

/// Finds the zero pages once, so that no restore has to read them.
fn build_zero_map(draft: &Draft) -> Result<(), uffd_handler::sealed_file::SealedFileError> {
    let memory = draft.dir().join(manifest::MEMORY);
    uffd_handler::source::ZeroMap::scan(&memory)?.save(&draft.dir().join(ZERO_MAP))
}

/// The memory of a snapshot that stands on nothing, for the page server. With `record`, demand
/// faults are recorded and nothing is put in place ahead of them.
pub fn memory_plan(dir: &Path, record: bool) -> MemoryPlan {
    let optional = |name: &str| {
        let path = dir.join(name);
        path.is_file().then_some(path)
    };
    let mut plan = MemoryPlan::flat(dir.join(manifest::MEMORY), optional(ZERO_MAP));
    plan.working_set = if record { None } else { optional(WORKING_SET) };
    plan.record = record;
    plan
}
