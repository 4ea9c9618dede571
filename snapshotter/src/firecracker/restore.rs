//! From a snapshot to a paused VM.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::time::timeout;
use uffd_handler::handshake::{self, Expect};
use uffd_handler::supervisor::{MemoryPlan, Supervisor};

use super::api::{ApiClient, ApiError, MemoryBackendType, NetworkOverride, SnapshotLoad};
use super::home::{self, Access, Home};
use super::spawn::{Console, SpawnSpec, Spawned, died};
use super::vm::{FirecrackerVm, Origin};
use super::{COMMAND_DEADLINE, Firecracker, LOAD_DEADLINE, Limits, NIC, SCRATCH};
use crate::priority;
use crate::vmm::{
    MemoryBackend, Phases, Priority, RestoreSpec, Shell, Vm, VmRecord, VmmError, read_vmstate,
};

/// A Firecracker that refuses a snapshot answers and ends. Its end can be seen before its answer has
/// been read, which is waited for this long: it has the reason.
const SOON: Duration = Duration::from_millis(500);

/// A started Firecracker with everything in its home that it will load.
#[derive(Debug)]
pub(super) struct FirecrackerShell {
    vm: FirecrackerVm,
    tap: String,
    listener: Option<UnixListener>,
    plan: MemoryPlan,
    limits: Limits,
    track_dirty_pages: bool,
}

/// Starts the process that will load `spec`.
pub(super) async fn prepare(
    driver: &Firecracker,
    spec: &RestoreSpec,
) -> Result<FirecrackerShell, VmmError> {
    let spawn = SpawnSpec {
        id: &spec.id,
        run_dir: &spec.run_dir,
        root_disk: &spec.root_disk,
        scratch_disk: &spec.scratch_disk,
        size: spec.size,
        nic: &spec.nic,
        console: if driver.config.restored_console { Console::File } else { Console::Discard },
    };
    let mut listener = None;
    let fill = |home: &Home| {
        match &spec.vmstate_key {
            None => home.copy(&spec.vmstate, home::VMSTATE)?,
            // Firecracker opens it by name; it goes as soon as it is loaded.
            Some(key) => home.write(&read_vmstate(&spec.vmstate, key)?, home::VMSTATE)?,
        }
        match spec.backend {
            // Only the page server opens the memory then.
            MemoryBackend::Uffd => listener = Some(home.listen(home::UFFD)?),
            MemoryBackend::File => home.put(&spec.memory_file, home::MEMORY, Access::ReadOnly)?,
        }
        Ok(())
    };
    let spawned = driver.spawn(&spawn, fill).await?;
    if spec.background {
        priority::set(spawned.process.id().pid, Priority::Background);
    }
    let tap = spawned.tap.clone();
    let pager = listener.is_some().then(|| Arc::clone(&driver.pager));
    let common = (spec.id.as_str(), spec.run_dir.as_path(), spec.size, spec.backend);
    Ok(FirecrackerShell {
        vm: FirecrackerVm::new(driver, common, spawned, Origin::Restored, pager),
        tap,
        listener,
        plan: spec.memory.clone(),
        limits: driver.config.limits,
        track_dirty_pages: driver.config.track_dirty_pages,
    })
}

#[async_trait]
impl Shell for FirecrackerShell {
    fn record(&self) -> VmRecord {
        self.vm.record()
    }

    fn set_priority(&self, priority: Priority) {
        self.vm.set_priority(priority);
    }

    async fn load(self: Box<Self>) -> Result<(Box<dyn Vm>, Phases), VmmError> {
        match self.load_and_limit().await {
            Ok(phases) => Ok((Box::new(self.vm), phases)),
            Err(e) => {
                // The page server may know the VM already.
                self.vm.kill().await;
                Err(e)
            }
        }
    }
}

impl FirecrackerShell {
    async fn load_and_limit(&self) -> Result<Phases, VmmError> {
        let mut phases = self.vm.spawned().phases.clone();
        let started = Instant::now();
        let Spawned { process, api, home, .. } = self.vm.spawned();
        let mut loading = std::pin::pin!(self.with_memory(self.put_load(api)));
        tokio::select! {
            biased;
            loaded = &mut loading => loaded?,
            reason = process.exited() => {
                if let Ok(Err(e @ VmmError::Refused { .. })) = timeout(SOON, loading).await {
                    return Err(e);
                }
                let record = self.vm.record();
                return Err(died(&record.id, &record.run_dir, home, reason));
            }
        }
        // They have done their work; nothing can connect or load a second time.
        home.forget(home::UFFD);
        home.forget(home::VMSTATE);
        phases.push(("load", started.elapsed()));
        if self.limits != Limits::default() {
            let since = Instant::now();
            if let Err(e) = self.put_limits(api).await {
                return Err(self.vm.explain("setting rate limits", e).await);
            }
            phases.push(("limits", since.elapsed()));
        }
        Ok(phases)
    }

    async fn put_load(&self, api: &ApiClient) -> Result<(), VmmError> {
        let memory = match self.listener {
            Some(_) => MemoryBackendType::Uffd(home::UFFD.to_owned()),
            None => MemoryBackendType::File(home::MEMORY.to_owned()),
        };
        let mut load = SnapshotLoad::new(home::VMSTATE, memory);
        load.track_dirty_pages = self.track_dirty_pages;
        load.network_overrides =
            vec![NetworkOverride { iface_id: NIC.to_owned(), host_dev_name: self.tap.clone() }];
        match api.load_snapshot(&load, LOAD_DEADLINE).await {
            Ok(()) => Ok(()),
            Err(e) => Err(self.vm.explain("loading the snapshot", e).await),
        }
    }

    /// Waits for `put` and gives the memory that comes meanwhile to the page server.
    async fn with_memory(
        &self,
        put: impl Future<Output = Result<(), VmmError>>,
    ) -> Result<(), VmmError> {
        let Some(listener) = &self.listener else { return put.await };
        let record = self.vm.record();
        let memory_error = |message| VmmError::Memory { id: record.id.clone(), message };
        let pager = self.vm.pager().ok_or_else(|| memory_error("no page server".to_owned()))?;
        let own = listener.try_clone().map_err(|e| memory_error(e.to_string()))?;
        // Dropped on every way out, so that the thread below never waits for someone who cannot
        // come any more.
        let _stop = StopListening(listener);
        let expect = Expect {
            memory_bytes: record.size.memory_bytes,
            peer_uid: Some(self.vm.spawned().home.uid()),
            peer_pid: Some(record.process.pid),
        };
        let (id, plan) = (record.id.clone(), self.plan.clone());
        // Along with the thread goes whose request this is for.
        let span = tracing::Span::current();
        let register = tokio::task::spawn_blocking(move || {
            span.in_scope(|| register(&own, &expect, &pager, &id, &plan))
        });
        let register =
            async { register.await.unwrap_or_else(|e| Err(e.to_string())).map_err(memory_error) };
        let mut put = std::pin::pin!(put);
        let mut register = std::pin::pin!(register);
        tokio::select! {
            biased;
            loaded = &mut put => { loaded?; register.await }
            registered = &mut register => match registered {
                Ok(()) => put.await,
                Err(e) => match timeout(SOON, put).await {
                    Ok(Err(refused @ VmmError::Refused { .. })) => Err(refused),
                    _ => Err(e),
                },
            }
        }
    }

    /// A snapshot has the limits of the VM it was made of.
    async fn put_limits(&self, api: &ApiClient) -> Result<(), ApiError> {
        let Limits { disk, network_rx, network_tx } = self.limits;
        if let Some(limiter) = disk {
            api.limit_drive(SCRATCH, limiter, COMMAND_DEADLINE).await?;
        }
        if network_rx.is_some() || network_tx.is_some() {
            api.limit_nic(NIC, network_rx, network_tx, COMMAND_DEADLINE).await?;
        }
        Ok(())
    }
}

/// Accepts the handshake and hands it to the page server. Blocks.
fn register(
    listener: &UnixListener,
    expect: &Expect,
    pager: &Supervisor,
    id: &str,
    plan: &MemoryPlan,
) -> Result<(), String> {
    let handshake = handshake::accept(listener, expect, LOAD_DEADLINE)
        .map_err(|e| format!("handshake: {e}"))?;
    pager.add_vm(id, handshake, plan).map_err(|e| format!("page server: {e}"))
}

/// Ends the wait of whoever accepts on the socket.
struct StopListening<'a>(&'a UnixListener);

impl Drop for StopListening<'_> {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(self.0, rustix::net::Shutdown::Both);
    }
}
