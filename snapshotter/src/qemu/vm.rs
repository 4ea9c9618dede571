//! A QEMU virtual machine that has been booted, loaded or adopted.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use guest_agent::client::{AgentClient, AgentError};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::sync::broadcast;
use uffd_handler::seal::Key;
use uffd_handler::source::DeltaSummary;
use uffd_handler::supervisor::Supervisor;
use zeroize::Zeroizing;

use super::args::MEMORY_FD;
use super::line::Line;
use super::qmp::{Event, Qmp};
use super::{COMMAND_DEADLINE, KILL_DEADLINE, STATE_DEADLINE, VMM};
use crate::priority;
use crate::process::{ExitReason, Process};
use crate::vmm::{self, MemoryBackend, Priority, SnapshotFiles, Vm, VmRecord, VmmError};
use crate::{delta, manifest};

/// How this process can get at the guest's memory.
#[derive(Debug, Clone)]
pub(super) enum GuestMemory {
    /// It is the file given at boot.
    OnFile,
    /// A memfd; pages that never faulted are holes in it.
    Memfd(Arc<File>),
    /// QEMU's private mapping of a memory file.
    Private,
}

impl GuestMemory {
    /// Finds the memfd of an adopted QEMU again: the process keeps the descriptor it inherited.
    pub(super) fn reopen(record: &VmRecord) -> Result<Self, VmmError> {
        match record.backend {
            MemoryBackend::File => Ok(Self::Private),
            MemoryBackend::Uffd => {
                let path = format!("/proc/{}/fd/{MEMORY_FD}", record.process.pid);
                let file =
                    File::options().read(true).write(true).open(&path).map_err(|source| {
                        VmmError::File { what: "cannot open", path: path.into(), source }
                    })?;
                Ok(Self::Memfd(Arc::new(file)))
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct QemuVm {
    record: VmRecord,
    process: Process,
    qmp: Qmp,
    /// `None` if it was booted, or started by a version that had none.
    line: Option<Line>,
    memory: GuestMemory,
    pager: Option<Arc<Supervisor>>,
}

impl QemuVm {
    pub(super) fn new(
        record: VmRecord,
        process: Process,
        qmp: Qmp,
        memory: GuestMemory,
        pager: Option<Arc<Supervisor>>,
    ) -> Self {
        let line = match Line::connect(&record.run_dir.join(super::LINE_SOCKET)) {
            Ok(line) => Some(line),
            Err(e) => {
                tracing::debug!(vm = %record.id, "no line monitor: {e}");
                None
            }
        };
        Self { record, process, qmp, line, memory, pager }
    }

    /// Writes the pages that are not those it was restored from, on a thread that may block.
    async fn write_changed(
        &self,
        memfd: Arc<File>,
        data: PathBuf,
        key: Option<Key>,
    ) -> Result<DeltaSummary, String> {
        let pager = self.pager.as_ref().ok_or("no page server serves it")?;
        let below = pager.memory_layers(&self.record.id).map_err(|e| e.to_string())?;
        let write = move || delta::write(&memfd, &below, &data, key.as_ref());
        let work = tokio::task::spawn_blocking(write);
        work.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    }

    async fn command(&self, name: &str, arguments: serde_json::Value) -> Result<(), VmmError> {
        tokio::select! {
            biased;
            reply = self.qmp.command(name, arguments, COMMAND_DEADLINE) => {
                reply.map(drop).map_err(|e| super::from_qmp(&self.record, e))
            }
            reason = self.process.exited() => Err(super::died(&self.record, reason)),
        }
    }

    /// Receives the device state over a socket and writes it to `path`.
    async fn write_vmstate(&self, path: &Path, key: Option<&Key>) -> Result<(), VmmError> {
        let socket = self.record.run_dir.join("migrate.sock");
        let _ = std::fs::remove_file(&socket);
        let listener = tokio::net::UnixListener::bind(&socket).map_err(|source| {
            VmmError::File { what: "cannot listen on", path: socket.clone(), source }
        })?;
        let mut events = self.qmp.events();
        self.command(
            "migrate-set-capabilities",
            json!({"capabilities": [
                {"capability": "x-ignore-shared", "state": true},
                {"capability": "events", "state": true},
            ]}),
        )
        .await?;
        let uri = format!("unix:{}", socket.display());
        let receive = async {
            let (mut stream, _) = listener.accept().await?;
            let mut state = Zeroizing::new(Vec::with_capacity(1 << 20));
            stream.read_to_end(&mut state).await?;
            Ok(state)
        };
        let receive = async {
            receive.await.map_err(|source| VmmError::Control {
                vmm: VMM,
                id: self.record.id.clone(),
                source,
            })
        };
        let send = async {
            self.command("migrate", json!({"uri": uri})).await?;
            migration_end(&self.qmp, &mut events, &self.record).await
        };
        let done = tokio::time::timeout(STATE_DEADLINE, async { tokio::try_join!(receive, send) });
        let done = done.await;
        let _ = std::fs::remove_file(&socket);
        done.map_err(|_| VmmError::Timeout {
            vmm: VMM,
            id: self.record.id.clone(),
            step: "writing device state",
            after: STATE_DEADLINE,
            log: super::log_tail(&self.record.run_dir),
        })?
        .and_then(|(state, ())| vmm::write_vmstate(path, &state, key))
    }
}

#[async_trait]
impl Vm for QemuVm {
    fn record(&self) -> VmRecord {
        self.record.clone()
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.command("cont", json!({})).await
    }

    async fn let_run(&self) -> Result<(), VmmError> {
        let Some(line) = &self.line else { return self.resume().await };
        line.resume().map_err(|source| {
            let id = self.record.id.clone();
            VmmError::Control { vmm: VMM, id, source }
        })
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.command("stop", json!({})).await
    }

    async fn snapshot(&self, into: &Path, key: Option<&Key>) -> Result<SnapshotFiles, VmmError> {
        if matches!(self.memory, GuestMemory::Private) {
            return Err(VmmError::Unsupported(
                "a QEMU VM that maps its memory file cannot be paused or forked: QEMU writes such \
                 memory into the device state, which then loads nowhere else"
                    .to_owned(),
            ));
        }
        let started = Instant::now();
        let vmstate = into.join("vmstate.bin");
        self.write_vmstate(&vmstate, key).await?;
        let mut phases = vec![("vmstate", started.elapsed())];
        match &self.memory {
            GuestMemory::OnFile | GuestMemory::Private => {
                let (memory, delta, delta_digest) = (None, None, None);
                Ok(SnapshotFiles { vmstate, memory, delta, delta_digest, phases })
            }
            GuestMemory::Memfd(memfd) => {
                let started = Instant::now();
                let data = into.join(manifest::DELTA);
                let failed =
                    |message: String| VmmError::Memory { id: self.record.id.clone(), message };
                let summary =
                    self.write_changed(Arc::clone(memfd), data.clone(), key.cloned()).await;
                let summary = summary.map_err(failed)?;
                phases.push(("memory", started.elapsed()));
                let (delta, delta_digest) = (Some(data), Some(summary.digest));
                Ok(SnapshotFiles { vmstate, memory: None, delta, delta_digest, phases })
            }
        }
    }

    async fn connect_agent(&self, deadline: Duration) -> Result<AgentClient, AgentError> {
        AgentClient::connect_serial(&self.record.run_dir.join("agent.sock"), deadline).await
    }

    fn set_priority(&self, priority: Priority) {
        priority::set(self.record.process.pid, priority);
    }

    async fn kill(&self) {
        priority::dying(self.record.process.pid);
        if self.process.kill(KILL_DEADLINE).await.is_none() {
            tracing::error!(vm = %self.record.id, pid = self.record.process.pid,
                "killed VMM process is still there after {KILL_DEADLINE:?}");
        }
        if let Some(pager) = &self.pager {
            pager.remove_vm(&self.record.id);
        }
    }

    async fn exited(&self) -> ExitReason {
        self.process.exited().await
    }

    fn leave_running(&self) {
        self.process.release();
    }
}

/// Waits for the migration events to name an end. Events were enabled and subscribed to before the
/// migration started, so none can be missed.
pub(super) async fn migration_end(
    qmp: &Qmp,
    events: &mut broadcast::Receiver<Event>,
    record: &VmRecord,
) -> Result<(), VmmError> {
    loop {
        let event = events.recv().await.map_err(|_| VmmError::Control {
            vmm: VMM,
            id: record.id.clone(),
            source: std::io::ErrorKind::UnexpectedEof.into(),
        })?;
        if event.name != "MIGRATION" {
            continue;
        }
        match event.data["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                let why = qmp.command("query-migrate", json!({}), COMMAND_DEADLINE).await.ok();
                let why = why.as_ref().and_then(|w| w["error-desc"].as_str()).map(str::to_owned);
                return Err(VmmError::Refused {
                    vmm: VMM,
                    id: record.id.clone(),
                    command: "migration".to_owned(),
                    message: why.unwrap_or_else(|| super::log_tail(&record.run_dir)),
                });
            }
            _ => {}
        }
    }
}
