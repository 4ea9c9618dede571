//! A spawned QEMU that waits for its device state, with its memory already at the page server.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::json;
use uffd_handler::handshake::{self, Expect};
use uffd_handler::supervisor::Supervisor;

use super::args::{MEMORY_FD, Machine, Memory, Start, VMSTATE_FD};
use super::qmp::Qmp;
use super::vm::{GuestMemory, QemuVm};
use super::{COMMAND_DEADLINE, Qemu, START_DEADLINE, STATE_DEADLINE, VMM};
use crate::priority;
use crate::process::Process;
use crate::vmm::{
    self, MemoryBackend, Phases, Priority, RestoreSpec, Shell, Vm, VmRecord, VmmError, VmmKind,
};

#[derive(Debug)]
pub(super) struct QemuShell {
    record: VmRecord,
    process: Process,
    qmp: Qmp,
    memory: GuestMemory,
    pager: Option<Arc<Supervisor>>,
    spawn_time: Duration,
}

/// Spawns QEMU for `spec` and registers its memory with the page server.
pub(super) async fn prepare(driver: &Qemu, spec: &RestoreSpec) -> Result<QemuShell, VmmError> {
    let started = Instant::now();
    let file_err = |what, path: &std::path::Path| {
        let path = path.to_owned();
        move |source: std::io::Error| VmmError::File { what, path, source }
    };
    let vmstate = match &spec.vmstate_key {
        None => File::open(&spec.vmstate).map_err(file_err("cannot open", &spec.vmstate))?,
        // In the clear in memory only.
        Some(key) => in_memory(&vmm::read_vmstate(&spec.vmstate, key)?)
            .map_err(file_err("memory for", &spec.vmstate))?,
    };
    let mut fds: Vec<(OwnedFd, i32)> = vec![(vmstate.into(), VMSTATE_FD)];
    let mut env = Vec::new();
    let uffd_socket = spec.run_dir.join("uffd.sock");
    let (memory_arg, memory, listener) = match spec.backend {
        MemoryBackend::File => (Memory::PrivateFile(&spec.memory_file), GuestMemory::Private, None),
        MemoryBackend::Uffd => {
            let memfd = guest_memfd(spec).map_err(file_err("memory for", &spec.run_dir))?;
            let for_child = memfd.try_clone().map_err(file_err("memory for", &spec.run_dir))?;
            fds.push((for_child.into(), MEMORY_FD));
            env.push(("LD_PRELOAD", driver.config.shim.to_string_lossy().into_owned()));
            env.push(("RETHAW_UFFD_SIZE", spec.size.memory_bytes.to_string()));
            env.push(("RETHAW_UFFD_SOCKET", uffd_socket.to_string_lossy().into_owned()));
            let listener = super::listen(&uffd_socket)?;
            (Memory::Memfd, GuestMemory::Memfd(Arc::new(memfd)), Some(listener))
        }
    };
    let machine = Machine {
        accelerator: driver.config.accelerator,
        size: spec.size,
        memory: memory_arg,
        root_disk: &spec.root_disk,
        scratch_disk: &spec.scratch_disk,
        nic: &spec.nic,
        console: None,
        start: Start::Incoming,
    };
    let process = driver.spawn(&spec.id, &spec.run_dir, &machine, fds, env, spec.background)?;
    let record = VmRecord {
        id: spec.id.clone(),
        vmm: VmmKind::Qemu,
        process: process.id(),
        run_dir: spec.run_dir.clone(),
        backend: spec.backend,
        size: spec.size,
        details: BTreeMap::new(),
    };
    let registered = async {
        match listener {
            Some(listener) => register(driver, spec, listener, process.id().pid).await.map(Some),
            None => Ok(None),
        }
    };
    let (qmp, pager) = tokio::select! {
        biased;
        both = async { tokio::try_join!(super::connect(&record, &process), registered) } => both?,
        reason = process.exited() => return Err(super::died(&record, reason)),
        never = priority::starved(record.process.pid) => match never {},
    };
    // The socket has done its work; nothing can connect to it a second time.
    let _ = std::fs::remove_file(&uffd_socket);
    let spawn_time = started.elapsed();
    Ok(QemuShell { record, process, qmp, memory, pager, spawn_time })
}

/// A file without a name.
fn in_memory(contents: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(memfd_create("rethaw-vmstate", MemfdFlags::CLOEXEC)?);
    file.write_all(contents)?;
    file.rewind()?;
    Ok(file)
}

fn guest_memfd(spec: &RestoreSpec) -> std::io::Result<File> {
    let fd = memfd_create("rethaw-guest", MemfdFlags::CLOEXEC)?;
    ftruncate(&fd, spec.size.memory_bytes)?;
    Ok(File::from(fd))
}

/// Accepts the handshake and hands it to the page server, on a thread that may block.
async fn register(
    driver: &Qemu,
    spec: &RestoreSpec,
    listener: std::os::unix::net::UnixListener,
    pid: i32,
) -> Result<Arc<Supervisor>, VmmError> {
    let pager = Arc::clone(&driver.pager);
    let (id, plan) = (spec.id.clone(), spec.memory.clone());
    let expect =
        Expect { memory_bytes: spec.size.memory_bytes, peer_uid: None, peer_pid: Some(pid) };
    // Along with the thread goes whose request this is for.
    let span = tracing::Span::current();
    let work = move || -> Result<Arc<Supervisor>, String> {
        let _in_span = span.enter();
        let handshake = handshake::accept(&listener, &expect, START_DEADLINE)
            .map_err(|e| format!("handshake: {e}"))?;
        pager.add_vm(&id, handshake, &plan).map_err(|e| format!("page server: {e}"))?;
        Ok(pager)
    };
    let result = tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string());
    result
        .and_then(|inner| inner)
        .map_err(|message| VmmError::Memory { id: spec.id.clone(), message })
}

#[async_trait]
impl Shell for QemuShell {
    fn record(&self) -> VmRecord {
        self.record.clone()
    }

    fn set_priority(&self, priority: Priority) {
        priority::set(self.record.process.pid, priority);
    }

    async fn load(self: Box<Self>) -> Result<(Box<dyn Vm>, Phases), VmmError> {
        let started = Instant::now();
        let loaded = tokio::select! {
            biased;
            loaded = tokio::time::timeout(STATE_DEADLINE, load_state(&self)) => loaded,
            reason = self.process.exited() => return Err(super::died(&self.record, reason)),
        };
        loaded.map_err(|_| VmmError::Timeout {
            vmm: VMM,
            id: self.record.id.clone(),
            step: "loading device state",
            after: STATE_DEADLINE,
            log: super::log_tail(&self.record.run_dir),
        })??;
        let phases = vec![("spawn", self.spawn_time), ("load", started.elapsed())];
        let Self { record, process, qmp, memory, pager, .. } = *self;
        Ok((Box::new(QemuVm::new(record, process, qmp, memory, pager)), phases))
    }
}

async fn load_state(shell: &QemuShell) -> Result<(), VmmError> {
    let (qmp, record) = (&shell.qmp, &shell.record);
    let from = |e| super::from_qmp(record, e);
    let mut events = qmp.events();
    let capabilities = json!({"capabilities": [
        {"capability": "x-ignore-shared", "state": true},
        {"capability": "events", "state": true},
    ]});
    let incoming = json!({"uri": format!("fd:{VMSTATE_FD}")});
    // One after the other without waiting for the first reply would save a round trip of 0.1 ms,
    // and a refused first command would be lost; it is not worth it.
    qmp.command("migrate-set-capabilities", capabilities, COMMAND_DEADLINE).await.map_err(from)?;
    qmp.command("migrate-incoming", incoming, COMMAND_DEADLINE).await.map_err(from)?;
    super::vm::migration_end(qmp, &mut events, record).await
}
