//! The end of the service: with its sandboxes, or without them.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::Engine;
use super::sandbox::State;

/// How long tasks may take to end by themselves.
const TASKS_DEADLINE: Duration = Duration::from_secs(20);

impl Engine {
    /// Lets claimed sandboxes and the page server outlive this process, for an upgrade: the next
    /// service on the same home takes them back. Parked VMs are nobody's and go.
    pub async fn leave(self: &Arc<Self>) {
        for sandbox in self.sandboxes() {
            // A transition under way is waited for; it is bounded by its own deadlines.
            if let Some(machine) = sandbox.machine.lock().await.take() {
                machine.leave_running();
            }
        }
        self.end_tasks().await;
    }

    /// Kills every VM and stops the page server. Afterwards no process, socket or file of a VM is
    /// left.
    pub async fn shutdown(self: &Arc<Self>) {
        let mut removals = JoinSet::new();
        for sandbox in self.sandboxes() {
            if sandbox.state() == State::Paused {
                continue;
            }
            let engine = Arc::clone(self);
            removals.spawn(async move { engine.remove(sandbox, "shutdown", None).await });
        }
        while let Some(done) = removals.join_next().await {
            if let Ok(Err(e)) = done {
                tracing::error!("shutdown: {e}");
            }
        }
        self.end_tasks().await;
        if let Some(network) = self.network() {
            network.take_down().await;
        }
        self.pager.shutdown();
    }

    async fn end_tasks(&self) {
        for template in self.templates() {
            template.cancel.cancel();
        }
        for pool in &self.pools {
            pool.close();
        }
        self.expiries.close();
        if let Some(network) = self.network() {
            network.close();
        }
        let mut tasks = {
            let mut tasks = self.tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            std::mem::take(&mut *tasks)
        };
        // Pools destroy their VMs when they end; a bake under way is dropped, and its VM with it.
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(TASKS_DEADLINE, all).await.is_err() {
            tracing::warn!("some work did not end in time and is dropped");
        }
        tasks.shutdown().await;
    }
}
