//! What a VM holds besides its process: its directory, its network, the connection to its agent. All
//! of it goes with the VM, unless it is to outlive the service.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use guest_agent::client::AgentClient;
use snapshotter::vmm::Vm;

use crate::net::{Addresses, Lease, NetworkRules};

/// A VM's directory: sockets, log, scratch disk. Removed when dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    keep: bool,
}

impl RunDir {
    /// Makes the directory of VM `id`.
    pub fn create(run: &Path, id: &str) -> std::io::Result<Self> {
        let path = run.join(id);
        std::fs::create_dir_all(&path)?;
        Ok(Self { path, keep: false })
    }

    /// Takes over the directory of a VM that a killed service left running.
    pub fn adopt(path: PathBuf) -> Self {
        Self { path, keep: false }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The scratch disk in it.
    pub fn scratch(&self) -> PathBuf {
        self.path.join(snapshotter::manifest::SCRATCH)
    }

    fn leave(&mut self) {
        self.keep = true;
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        match std::fs::remove_dir_all(&self.path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = ?self.path, "cannot remove VM directory: {e}");
            }
            _ => {}
        }
    }
}

/// A VM together with what it holds. Fields are dropped in order: process first, files last.
#[derive(Debug)]
pub struct Machine {
    /// The VM.
    pub vm: Arc<dyn Vm>,
    /// Connection to its agent.
    pub agent: AgentClient,
    dir: RunDir,
    network: Option<Lease>,
}

impl Machine {
    /// A VM with all it holds: just resumed, or taken back after a crash.
    pub fn new(vm: Arc<dyn Vm>, agent: AgentClient, dir: RunDir, network: Option<Lease>) -> Self {
        Self { vm, agent, dir, network }
    }

    /// Its addresses, where it has a network.
    pub fn addresses(&self) -> Option<&Addresses> {
        self.network.as_ref().map(Lease::addresses)
    }

    /// Its network's rules.
    pub fn rules(&self) -> Option<NetworkRules> {
        self.network.as_ref().map(Lease::rules)
    }

    /// Kills the VM, waits until it is gone, and removes its files.
    pub async fn destroy(self) {
        drop(self.end().await);
    }

    /// The same, but for the network.
    pub async fn end(self) -> Option<Lease> {
        let (vm, dir, network) = self.disconnect();
        vm.kill().await;
        // Files of a disk go in their own time, which a thread that serves others has not.
        match tokio::task::spawn_blocking(move || drop((vm, dir))).await {
            Ok(()) => network,
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }

    /// Closes the connection to the agent; whoever gets the parts has to kill the VM before the
    /// directory and the network go.
    pub fn disconnect(self) -> (Arc<dyn Vm>, RunDir, Option<Lease>) {
        let Self { vm, agent, dir, network } = self;
        drop(agent);
        (vm, dir, network)
    }

    /// Lets the VM outlive this process.
    pub fn leave_running(mut self) {
        self.vm.leave_running();
        self.dir.leave();
    }

    /// Its directory.
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }
}
