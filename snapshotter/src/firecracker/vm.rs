//! A Firecracker virtual machine that has been booted, loaded or adopted.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use guest_agent::client::{AgentClient, AgentError};
use guest_agent::wire::VSOCK_PORT;
use tokio::time::Instant;
use uffd_handler::seal::Key;
use uffd_handler::supervisor::Supervisor;

use super::api::{ApiClient, ApiError, VmState};
use super::home::{self, Home, Jail};
use super::spawn::{Spawned, api_error, died};
use super::{
    COMMAND_DEADLINE, Firecracker, JailConfig, KILL_DEADLINE, VMM, snapshot, spawn, vsock,
};
use crate::priority;
use crate::process::{ExitReason, Process};
use crate::vmm::{
    MachineSize, MemoryBackend, Priority, SnapshotFiles, Vm, VmRecord, VmmError, VmmKind,
};

const DETAIL_ORIGIN: &str = "origin";
const DETAIL_UID: &str = "uid";
const DETAIL_CGROUP_PARENT: &str = "cgroup_parent";

/// How a VM came to be, which decides what a snapshot of it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// From a kernel: its snapshot is a full one.
    Booted,
    /// From a snapshot: its snapshot holds what changed since.
    Restored,
}

impl Origin {
    fn as_str(self) -> &'static str {
        match self {
            Self::Booted => "booted",
            Self::Restored => "restored",
        }
    }
}

#[derive(Debug)]
pub(super) struct FirecrackerVm {
    record: VmRecord,
    spawned: Spawned,
    origin: Origin,
    can_diff: bool,
    pager: Option<Arc<Supervisor>>,
}

impl FirecrackerVm {
    pub(super) fn new(
        driver: &Firecracker,
        (id, run_dir, size, backend): (&str, &Path, MachineSize, MemoryBackend),
        spawned: Spawned,
        origin: Origin,
        pager: Option<Arc<Supervisor>>,
    ) -> Self {
        let mut details = BTreeMap::from([(DETAIL_ORIGIN.to_owned(), origin.as_str().to_owned())]);
        if let Some(jail) = spawned.home.jail() {
            details.insert(DETAIL_UID.to_owned(), jail.uid.number().to_string());
            details.insert(DETAIL_CGROUP_PARENT.to_owned(), jail.cgroup_parent.clone());
        }
        let record = VmRecord {
            id: id.to_owned(),
            vmm: VmmKind::Firecracker,
            process: spawned.process.id(),
            run_dir: run_dir.to_owned(),
            backend,
            size,
            details,
        };
        Self { record, spawned, origin, can_diff: driver.can_diff(), pager }
    }

    pub(super) fn spawned(&self) -> &Spawned {
        &self.spawned
    }

    pub(super) fn pager(&self) -> Option<Arc<Supervisor>> {
        self.pager.clone()
    }

    /// Waits for an API call, and says how the process ended if that is why it failed.
    async fn call(
        &self,
        step: &'static str,
        call: impl Future<Output = Result<(), ApiError>>,
    ) -> Result<(), VmmError> {
        let done = tokio::select! {
            biased;
            done = call => done,
            reason = self.spawned.process.exited() => {
                let VmRecord { id, run_dir, .. } = &self.record;
                return Err(died(id, run_dir, &self.spawned.home, reason));
            }
        };
        match done {
            Ok(()) => Ok(()),
            Err(e) => Err(self.explain(step, e).await),
        }
    }

    /// What an API error means for this VM.
    pub(super) async fn explain(&self, step: &'static str, error: ApiError) -> VmmError {
        let VmRecord { id, run_dir, .. } = &self.record;
        spawn::explain((id, run_dir), &self.spawned, step, error).await
    }
}

impl Firecracker {
    /// Whether a restored VM can say which pages changed.
    fn can_diff(&self) -> bool {
        use super::version::Field::LoadTrackDirtyPages;
        // Later versions ask the kernel which pages are there, if nothing was tracked.
        self.config.track_dirty_pages || LoadTrackDirtyPages.known_to(self.identity.version)
    }
}

/// Takes back a VM that a killed service left running.
pub(super) async fn adopt(
    driver: &Firecracker,
    record: &VmRecord,
) -> Result<FirecrackerVm, VmmError> {
    let process_error =
        |source| VmmError::Process { vmm: VMM, id: record.id.clone(), source, log: String::new() };
    let process = Process::adopt(record.process).map_err(process_error)?;
    let (api, home) = match find(driver, record).await {
        Ok(found) => found,
        Err(e) => {
            // Not ours to kill on a failed look: the caller decides.
            process.release();
            return Err(e);
        }
    };
    let booted = record.details.get(DETAIL_ORIGIN).is_some_and(|o| o == Origin::Booted.as_str());
    let pager = (record.backend == MemoryBackend::Uffd).then(|| Arc::clone(&driver.pager));
    Ok(FirecrackerVm {
        record: record.clone(),
        spawned: Spawned {
            process,
            api,
            home: Arc::new(home),
            tap: String::new(),
            phases: Vec::new(),
        },
        origin: if booted { Origin::Booted } else { Origin::Restored },
        can_diff: driver.can_diff(),
        pager,
    })
}

/// Finds the home and the API of a VM that runs.
async fn find(driver: &Firecracker, record: &VmRecord) -> Result<(ApiClient, Home), VmmError> {
    let wrong = |what: String| VmmError::Unsupported(format!("VM {}: {what}", record.id));
    let jail = match record.details.get(DETAIL_UID) {
        None => None,
        Some(uid) => {
            let uid = uid.parse().map_err(|e| wrong(format!("its user id {uid:?}: {e}")))?;
            let parent = record.details.get(DETAIL_CGROUP_PARENT).cloned();
            Some(Jail {
                uid: driver.uids.adopt(uid),
                cgroups: driver.cgroups.clone(),
                cgroup_parent: parent.unwrap_or_else(|| JailConfig::default().cgroup_parent),
            })
        }
    };
    let binary = &driver.config.binaries.firecracker;
    let home = Home::locate(&record.id, &record.run_dir, binary, jail);
    // Kept until it is known to be ours.
    home.release();
    let api = ApiClient::new(home.path(home::API), driver.identity.version);
    let instance = api.instance(COMMAND_DEADLINE).await;
    let instance = instance.map_err(|e| api_error(&record.id, "being asked who it is", e))?;
    let version = driver.identity.version.to_string();
    if instance.vmm_version != version {
        return Err(wrong(format!(
            "runs under {}, this driver has {version}",
            instance.vmm_version
        )));
    }
    home.retain();
    Ok((api, home))
}

#[async_trait]
impl Vm for FirecrackerVm {
    fn record(&self) -> VmRecord {
        self.record.clone()
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.call("resuming", self.spawned.api.patch_vm(VmState::Resumed, COMMAND_DEADLINE)).await
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.call("pausing", self.spawned.api.patch_vm(VmState::Paused, COMMAND_DEADLINE)).await
    }

    async fn snapshot(&self, into: &Path, key: Option<&Key>) -> Result<SnapshotFiles, VmmError> {
        if self.origin == Origin::Restored && !self.can_diff {
            return Err(VmmError::Unsupported(
                "a snapshot of a restored VM needs its written pages to be tracked".to_owned(),
            ));
        }
        let plan = snapshot::Plan::new(self.origin, self.record.size.memory_bytes);
        let started = Instant::now();
        let request = plan.request();
        let call = self.spawned.api.create_snapshot(&request, plan.deadline());
        self.call("writing a snapshot", call).await?;
        let mut phases = vec![("snapshot", started.elapsed())];
        let started = Instant::now();
        let mut files =
            snapshot::collect(plan, self.spawned.home.root(), into, key.cloned()).await?;
        phases.push(("collect", started.elapsed()));
        files.phases = phases;
        Ok(files)
    }

    async fn connect_agent(&self, deadline: Duration) -> Result<AgentClient, AgentError> {
        let socket = self.spawned.home.path(home::VSOCK);
        let dialled = vsock::dial(&socket, VSOCK_PORT, deadline).await;
        let stream = dialled.map_err(|e| match e {
            vsock::DialError::Timeout { .. } => {
                AgentError::Timeout { call: e.to_string(), deadline }
            }
            vsock::DialError::NotFirecracker { .. } => AgentError::Protocol(e.to_string()),
        })?;
        Ok(AgentClient::on_stream(stream))
    }

    fn set_priority(&self, priority: Priority) {
        priority::set(self.record.process.pid, priority);
    }

    async fn kill(&self) {
        let gone = self.spawned.process.kill(KILL_DEADLINE).await.is_some();
        if let Some(pager) = self.pager() {
            let id = self.record.id.clone();
            // It talks to another process, and may wait for it.
            let span = tracing::Span::current();
            let remove = move || span.in_scope(|| pager.remove_vm(&id));
            let _ = tokio::task::spawn_blocking(remove).await;
        }
        if gone {
            let home = Arc::clone(&self.spawned.home);
            let _ = tokio::task::spawn_blocking(move || home.remove()).await;
        } else {
            tracing::error!(vm = %self.record.id, pid = self.record.process.pid,
                "killed VMM process is still there after {KILL_DEADLINE:?}, its home stays");
        }
    }

    async fn exited(&self) -> ExitReason {
        self.spawned.process.exited().await
    }

    fn leave_running(&self) {
        self.spawned.process.release();
        self.spawned.home.release();
    }
}
