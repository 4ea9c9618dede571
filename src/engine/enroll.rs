//! From a VM that was handed over to a sandbox that the engine knows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use snapshotter::vmm::Priority;
use time::OffsetDateTime;
use tracing::Instrument;

use super::Engine;
use super::claim::{CreateError, CreateRequest, Created};
use super::lifecycle::{Reidentified, Timings, millis};
use super::quota::Size;
use super::sandbox::{Origin, Sandbox, SandboxData};
use super::template::ReadyTemplate;
use super::token::AccessToken;
use crate::failpoint;
use crate::live;

/// By then a caller has the answer that it has a sandbox.
pub(super) const TOLD: Duration = Duration::from_millis(3);

impl Engine {
    /// What is stored of the sandbox that a VM becomes.
    pub(super) fn describe(
        &self,
        vm: &Reidentified,
        origin: Origin,
        source: &ReadyTemplate,
        request: &CreateRequest,
        token: &AccessToken,
    ) -> SandboxData {
        let now = OffsetDateTime::now_utc();
        SandboxData {
            id: vm.id.clone(),
            template: source.name.clone(),
            origin,
            owner: request.owner.clone(),
            size: Size::of(source),
            metadata: request.metadata.clone(),
            env: request.env.clone(),
            created_at: now,
            timeout_seconds: request.timeout.as_secs(),
            expires_at: now + request.timeout,
            on_timeout: request.on_timeout,
            token_sha256: token.sha256(),
            token_nonce: token.nonce.clone(),
            vmm: self.context.driver.kind().as_str().to_owned(),
            timings_ms: Timings::new(),
            restored_from: source.snapshot.clone(),
            paused_in: None,
            key: None,
            idle_timeout_seconds: request.idle_timeout.map(|t| t.as_secs()),
            made_by: request.made_by.clone(),
            network: request.network.clone(),
            addresses: vm.machine.addresses().cloned(),
        }
    }

    /// Makes a sandbox of a VM that was restored for it.
    pub(super) async fn register(
        self: &Arc<Self>,
        vm: Reidentified,
        origin: Origin,
        source: &ReadyTemplate,
        request: CreateRequest,
        token: AccessToken,
        started: Instant,
    ) -> Result<Created, CreateError> {
        let mut data = self.describe(&vm, origin, source, &request, &token);
        data.timings_ms = vm.timings.clone();
        data.timings_ms.insert("total".to_owned(), millis(started.elapsed()));
        // Before the caller hears of it: a service killed from here on knows whose VM this is.
        if let Err(e) = self.context.db.vm_claimed(&vm.id, &data, &vm.identity).await {
            vm.machine.destroy().await;
            return Err(e.into());
        }
        failpoint::reached("claim.noted").await;
        Ok(self.enroll(vm, data, token))
    }

    /// Knows a sandbox from now on, whose note in the database is made.
    pub(super) fn enroll(
        self: &Arc<Self>,
        vm: Reidentified,
        data: SandboxData,
        token: AccessToken,
    ) -> Created {
        // While the caller reads that it has a sandbox: before it is told, page server and guest would
        // take the CPU from that.
        vm.machine.agent.start_http_after(TOLD);
        let (id, origin, template) = (vm.id.clone(), data.origin, data.template.clone());
        self.told(&vm, &data);
        let process = Arc::clone(&vm.machine.vm);
        let sandbox = Arc::new(Sandbox::running(data, vm.identity, vm.machine));
        self.sandboxes.insert(id.clone(), Arc::clone(&sandbox));
        live::changed();
        self.expiries.set(&id, sandbox.ends_at());
        self.watch_sandbox(&sandbox, process);
        tracing::info!(sandbox = %id, %template, origin = origin.as_str(), "sandbox made");
        Created { sandbox, access_token: token.secret }
    }

    /// Does what can wait until the caller was told.
    fn told(&self, vm: &Reidentified, data: &SandboxData) {
        let (pager, db) = (Arc::clone(&self.pager), self.context.db.clone());
        let (process, id) = (Arc::clone(&vm.machine.vm), vm.id.clone());
        // What was noted during a hand-over cannot tell how long it took.
        let timings = (data.origin == Origin::Warm).then(|| data.timings_ms.clone());
        let work = async move {
            tokio::time::sleep(TOLD).await;
            pager.claim(&id);
            let Some(timings) = timings else { return };
            process.set_priority(Priority::Normal);
            if let Err(e) = db.vm_timings(&id, &timings).await {
                tracing::error!(sandbox = %id, "{e}");
            }
        };
        tokio::spawn(work.in_current_span());
    }
}
