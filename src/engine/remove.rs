//! The end of a sandbox: its VM, its key, its files and its row, in that order.

use std::sync::Arc;

use tracing::Instrument;

use super::sandbox::{Sandbox, State};
use super::state::Event;
use super::{Engine, SandboxError};
use crate::{failpoint, live};

impl Engine {
    /// Removes a sandbox and all it held. What is done is done also if the caller goes away.
    pub async fn delete(self: &Arc<Self>, id: &str) -> Result<(), SandboxError> {
        let sandbox = self.sandbox(id)?;
        let engine = Arc::clone(self);
        let work = async move { engine.remove(sandbox, "deleted", None).await };
        let work = tokio::spawn(work.in_current_span());
        match work.await {
            Ok(done) => done,
            // The task panicked; the VM is still listed and can be deleted again.
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }

    /// Removes a sandbox; with `only`, only if it is still in that state once its turn has come.
    pub(super) async fn remove(
        &self,
        sandbox: Arc<Sandbox>,
        reason: &'static str,
        only: Option<State>,
    ) -> Result<(), SandboxError> {
        let id = sandbox.data().id;
        let mut machine = sandbox.machine.lock().await;
        if let Some(wanted) = only {
            sandbox.expect(wanted, reason)?;
        }
        sandbox.apply(Event::Delete)?;
        sandbox.set_agent(None);
        failpoint::reached("delete.begun").await;
        if let Some(machine) = machine.take() {
            machine.destroy().await;
        }
        if let Some(network) = self.network() {
            network.let_go(&sandbox.identity().values.mac);
        }
        failpoint::reached("delete.killed").await;
        // Before anything else of what is on disk: without it, the rest is noise.
        // One whose pause failed half-way may be there too, under the same name.
        let key = sandbox.data().key.unwrap_or_else(|| id.clone());
        if self.context.keys.exists(&key) {
            self.destroy_key(&key).await;
        }
        failpoint::reached("delete.key_destroyed").await;
        self.expiries.clear(&id);
        self.sandboxes.remove(&id);
        live::changed();
        self.context.db.vm_gone(&id).await?;
        failpoint::reached("delete.noted").await;
        let data = sandbox.data();
        for snapshot in data.paused_in.iter().chain([&data.restored_from]) {
            self.drop_workspace(snapshot).await;
        }
        metrics::counter!("rethaw_sandboxes_gone_total", "reason" => reason).increment(1);
        tracing::info!(sandbox = %id, reason, "sandbox gone");
        Ok(())
    }
}
