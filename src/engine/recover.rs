//! After a crash: every VM the database knows is taken back or removed, and so is every process and
//! directory that it does not know.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use snapshotter::process::{Process, ProcessId, start_time};
use snapshotter::vmm::{Priority, Vm};
use uffd_handler::supervisor::PagerEvent;

use super::db::{DbError, Stage, VmRow};
use super::machine::{Machine, RunDir};
use super::pause::resume_request;
use super::sandbox::Sandbox;
use super::{Engine, StartError};

/// How long a VM that outlived its service may take to answer before it is given up.
const ADOPT_DEADLINE: Duration = Duration::from_secs(5);
/// How long a leftover process may take to die.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

impl Engine {
    /// Takes back or removes whatever an earlier service left.
    pub(super) async fn recover(self: &Arc<Self>) -> Result<(), StartError> {
        let rows = self.context.db.vms().await?;
        // What an interrupted request made is nobody's: its reply, with id and token, was never
        // sent. The client will send it again.
        let interrupted = self.context.db.idempotency_interrupted().await?;
        let unanswered = |row: &VmRow| {
            let made_by = row.sandbox.as_ref().and_then(|s| s.made_by.as_ref());
            made_by.is_some_and(|name| interrupted.contains(name))
        };
        let mut known = HashSet::new();
        for row in rows {
            match row.stage {
                _ if unanswered(&row) => self.remove_leftover(&row).await?,
                Stage::Claimed => {
                    let id = row.id.clone();
                    if self.take_back(row).await? {
                        known.insert(id);
                    }
                }
                Stage::Paused => self.list_paused(row).await?,
                // Nobody was promised these: they are cheaper to make again than to trust.
                Stage::Starting | Stage::Parked => self.remove_leftover(&row).await?,
            }
        }
        self.sweep(&known).await
    }

    /// Shows a paused sandbox again; its VM may still be there when the service was killed before it
    /// had killed that, or while it brought the sandbox back.
    async fn list_paused(&self, row: VmRow) -> Result<(), DbError> {
        if let Some(record) = &row.record {
            kill_if_same(record.process).await;
            drop(RunDir::adopt(record.run_dir.clone()));
        }
        self.pager.remove_vm(&row.id);
        let (Some(data), Some(identity)) = (row.sandbox, row.identity) else {
            tracing::error!(sandbox = %row.id, "its record is incomplete");
            return self.context.db.vm_gone(&row.id).await;
        };
        // Its removal was under way: the key goes first.
        if data.key.as_ref().is_some_and(|key| !self.context.keys.exists(key)) {
            tracing::info!(sandbox = %row.id, "its key is destroyed: removing the rest");
            return self.context.db.vm_gone(&row.id).await;
        }
        self.sandboxes.insert(row.id, Arc::new(Sandbox::paused(data, identity)));
        Ok(())
    }

    /// Reconnects to a claimed sandbox's VM; one that does not answer is removed.
    async fn take_back(self: &Arc<Self>, row: VmRow) -> Result<bool, DbError> {
        let attempt = async {
            let lost = self.pager.lost_at_start();
            if let Some((_, why)) = lost.iter().find(|(id, _)| *id == row.id) {
                return Err(format!("its memory cannot be served: {why}"));
            }
            let record = row.record.as_ref().ok_or_else(|| "it had no process".to_owned())?;
            let vm = self.context.driver.adopt(record).await.map_err(|e| e.to_string())?;
            let vm: Arc<dyn Vm> = Arc::from(vm);
            vm.set_priority(Priority::Normal);
            // The service may have been killed in the middle of a pause or a fork: then the vCPUs
            // stand still and the workload is frozen. Both calls change nothing otherwise.
            vm.resume().await.map_err(|e| e.to_string())?;
            let agent = vm.connect_agent(ADOPT_DEADLINE).await.map_err(|e| e.to_string())?;
            let (Some(data), Some(identity)) = (row.sandbox.clone(), row.identity.clone()) else {
                return Err("its record is incomplete".to_owned());
            };
            // Or in the middle of a claim: then it was not handed over, or not told so.
            let token = self.tokens.again(&data.token_nonce);
            let mut thaw = resume_request(token.as_ref().map(|t| t.secret.as_str()));
            thaw.env = data.env.clone();
            agent.resume(&thaw, ADOPT_DEADLINE).await.map_err(|e| e.to_string())?;
            let dir = RunDir::adopt(record.run_dir.clone());
            let network = match (&self.context.network, &data.addresses) {
                (Some(network), Some(addresses)) => {
                    let pid = record.process.pid;
                    let lease = network.adopt(pid, addresses.clone(), data.network.clone()).await;
                    Some(lease.map_err(|e| e.to_string())?)
                }
                _ => None,
            };
            Ok((data, identity, Machine::new(vm, agent, dir, network)))
        };
        match attempt.await {
            Ok((data, identity, machine)) => {
                let process = Arc::clone(&machine.vm);
                let sandbox = Arc::new(Sandbox::running(data, identity, machine));
                self.sandboxes.insert(row.id.clone(), Arc::clone(&sandbox));
                self.expiries.set(&row.id, sandbox.ends_at());
                self.watch_sandbox(&sandbox, process);
                metrics::counter!("rethaw_vms_recovered_total", "outcome" => "serving")
                    .increment(1);
                tracing::info!(sandbox = %row.id, "taken back");
                Ok(true)
            }
            Err(why) => {
                metrics::counter!("rethaw_vms_recovered_total", "outcome" => "lost").increment(1);
                tracing::error!(sandbox = %row.id, "lost over the restart: {why}");
                self.remove_leftover(&row).await?;
                Ok(false)
            }
        }
    }

    async fn remove_leftover(&self, row: &VmRow) -> Result<(), DbError> {
        if let Some(record) = &row.record {
            kill_if_same(record.process).await;
            drop(RunDir::adopt(record.run_dir.clone()));
        }
        self.pager.remove_vm(&row.id);
        self.context.db.vm_gone(&row.id).await
    }

    /// Removes VM directories without a row, and first the processes that run in them: a service
    /// killed between a spawn and the note of it leaves just that.
    async fn sweep(&self, known: &HashSet<String>) -> Result<(), StartError> {
        let run = &self.context.run;
        let failed = |source| StartError::Directory { path: run.clone(), source };
        let mut doomed = Vec::new();
        for entry in std::fs::read_dir(run).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if !known.contains(&*entry.file_name().to_string_lossy()) {
                doomed.push(entry.path());
            }
        }
        if doomed.is_empty() {
            return Ok(());
        }
        for process in std::fs::read_dir("/proc").map_err(failed)?.flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|p| p.parse::<i32>().ok()) else {
                continue;
            };
            // Read before the directory is compared: if the pid is reused in between, the start
            // time no longer matches and nothing is killed.
            let Ok(start_time) = start_time(pid) else { continue };
            let Ok(cwd) = std::fs::read_link(process.path().join("cwd")) else { continue };
            if doomed.contains(&cwd) {
                kill_if_same(ProcessId { pid, start_time }).await;
            }
        }
        for dir in doomed {
            if let Some(id) = dir.file_name() {
                self.pager.remove_vm(&id.to_string_lossy());
            }
            drop(RunDir::adopt(dir));
        }
        Ok(())
    }

    /// Acts on what the page server reports, for as long as the engine lives.
    pub(super) fn watch_pager(self: &Arc<Self>) {
        let events = self.pager.events();
        let engine = Arc::downgrade(self);
        let runtime = tokio::runtime::Handle::current();
        let watch = move || {
            for event in events {
                let Some(engine) = engine.upgrade() else { return };
                match event {
                    PagerEvent::VmGone { .. } => {}
                    PagerEvent::VmLost { id, reason } => {
                        tracing::error!(vm = %id, "memory lost: {reason}; killing the VM");
                        metrics::counter!("rethaw_vms_lost_total").increment(1);
                        runtime.spawn(async move { engine.kill_lost(&id).await });
                    }
                    PagerEvent::PagerRestarted { pid, vms, millis } => {
                        tracing::warn!(pid, vms, millis, "page server was replaced");
                        metrics::counter!("rethaw_pager_takeovers_total").increment(1);
                    }
                    PagerEvent::Graduated { id } => {
                        tracing::debug!(vm = %id, "all memory in place");
                        metrics::counter!("rethaw_vms_graduated_total").increment(1);
                    }
                    PagerEvent::PagerUnavailable { reason } => {
                        tracing::error!("no page server: {reason}; all VMs stand still");
                    }
                }
            }
        };
        if let Err(e) = std::thread::Builder::new().name("pager-events".to_owned()).spawn(watch) {
            tracing::error!("no thread for page server events: {e}");
        }
    }

    /// A VM whose memory cannot be served must not run on; its watchers do the rest.
    async fn kill_lost(&self, id: &str) {
        let rows = self.context.db.vms().await.unwrap_or_default();
        let row = rows.into_iter().find(|r| r.id == id);
        if let Some(record) = row.and_then(|r| r.record) {
            kill_if_same(record.process).await;
        }
    }
}

/// Kills a process if it is still the one that was meant.
async fn kill_if_same(id: ProcessId) {
    let Ok(process) = Process::adopt(id) else { return };
    if process.kill(KILL_DEADLINE).await.is_none() {
        tracing::error!(pid = id.pid, "leftover process does not die");
    }
    process.release();
}
