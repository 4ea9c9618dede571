//! Snapshots of sandboxes: written like a fork's, and kept until they are deleted, whatever becomes
//! of the sandbox. Sandboxes are made from one as from a template, each with an identity of its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tracing::Instrument;

use super::Engine;
use super::claim::{CreateError, CreateRequest, Created};
use super::db::DbError;
use super::identity::Owner;
use super::lifecycle;
use super::pause::TransitionError;
use super::sandbox::{Origin, Sandbox};
use super::workspace::release;

/// A snapshot of a sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxSnapshot {
    /// Its id, in the store too.
    pub id: String,
    /// Name its maker gave it; the newest of a name is the one that is meant by it.
    pub name: Option<String>,
    /// Template that it stands on.
    pub template: String,
    /// Sandbox that it was taken of.
    pub sandbox: String,
    /// Environment of the sandbox's commands.
    pub env: BTreeMap<String, String>,
    /// When it was taken.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

impl Engine {
    /// Takes a snapshot of a sandbox, which stands still for it and then runs on.
    pub async fn take_snapshot(
        self: &Arc<Self>,
        id: &str,
        name: Option<String>,
    ) -> Result<Arc<SandboxSnapshot>, TransitionError> {
        let sandbox = self.sandbox(id)?;
        let engine = Arc::clone(self);
        let work = async move { engine.take_snapshot_now(&sandbox, name).await };
        match tokio::spawn(work.in_current_span()).await {
            Ok(done) => done,
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }

    async fn take_snapshot_now(
        &self,
        sandbox: &Sandbox,
        name: Option<String>,
    ) -> Result<Arc<SandboxSnapshot>, TransitionError> {
        let (id, _) = self.freeze_for_fork(sandbox).await?;
        let data = sandbox.data();
        let snapshot = Arc::new(SandboxSnapshot {
            id: id.clone(),
            name,
            template: data.template,
            sandbox: data.id,
            env: data.env,
            created_at: OffsetDateTime::now_utc(),
        });
        self.keep_snapshot(&snapshot);
        if let Err(e) = self.context.db.snapshot_put(&snapshot).await {
            self.forget_snapshot(&id).await;
            return Err(e.into());
        }
        tracing::info!(sandbox = %snapshot.sandbox, snapshot = %id, "snapshot taken");
        Ok(snapshot)
    }

    /// Nobody needs to refer to it for its files to stay.
    fn keep_snapshot(&self, snapshot: &Arc<SandboxSnapshot>) {
        self.hold(&snapshot.id);
        self.snapshots.insert(snapshot.id.clone(), Arc::clone(snapshot));
    }

    async fn forget_snapshot(&self, id: &str) {
        self.snapshots.remove(id);
        release(&self.pinned, id);
        self.drop_workspace(id).await;
    }

    /// Finds the snapshots of an earlier service again.
    pub(super) async fn load_snapshots(&self) -> Result<(), DbError> {
        for snapshot in self.context.db.snapshots().await? {
            self.keep_snapshot(&Arc::new(snapshot));
        }
        Ok(())
    }

    /// Every snapshot, newest first.
    pub fn snapshots(&self) -> Vec<Arc<SandboxSnapshot>> {
        let mut all: Vec<_> = self.snapshots.iter().map(|s| Arc::clone(s.value())).collect();
        all.sort_by(|a, b| (b.created_at, &a.id).cmp(&(a.created_at, &b.id)));
        all
    }

    /// A snapshot by its id or its name.
    pub fn snapshot(&self, name: &str) -> Option<Arc<SandboxSnapshot>> {
        let by_id = self.snapshots.get(name).map(|s| Arc::clone(s.value()));
        by_id.or_else(|| {
            self.snapshots().into_iter().find(|snapshot| snapshot.name.as_deref() == Some(name))
        })
    }

    /// Deletes a snapshot; what was made from it lives on. Says whether there was one.
    pub async fn delete_snapshot(&self, name: &str) -> Result<bool, DbError> {
        let Some(snapshot) = self.snapshot(name) else { return Ok(false) };
        self.context.db.snapshot_gone(&snapshot.id).await?;
        self.forget_snapshot(&snapshot.id).await;
        Ok(true)
    }

    /// Makes a sandbox from a snapshot.
    pub(super) async fn create_from(
        self: &Arc<Self>,
        snapshot: &SandboxSnapshot,
        mut request: CreateRequest,
    ) -> Result<Created, CreateError> {
        let started = Instant::now();
        let source = Arc::new(self.resolve_workspace(&snapshot.template, &snapshot.id)?);
        let mut env = snapshot.env.clone();
        env.append(&mut request.env);
        request.env = env;
        let owner = Owner {
            access_token: self.tokens.issue(),
            env: request.env.clone(),
            network: request.network.clone(),
        };
        let vm = lifecycle::restore(&self.context, &source, Some(&owner)).await?;
        self.register(vm, Origin::Forked, &source, request, owner.access_token, started).await
    }
}
