//! One sandbox: what its user sees, and the machine behind it.

use std::collections::BTreeMap;
use std::sync::RwLock;

use guest_agent::client::AgentClient;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::Mutex;
use utoipa::ToSchema;

use super::db::StoredIdentity;
use super::lifecycle::{Machine, Timings};
use crate::live;

/// Where the machine came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// From the pool.
    Warm,
    /// Restored while the request waited.
    Restored,
    /// Brought back from a pause.
    Resumed,
    /// A clone of another sandbox.
    Forked,
}

impl Origin {
    /// Its name in the API and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Restored => "restored",
            Self::Resumed => "resumed",
            Self::Forked => "forked",
        }
    }
}

/// What happens when a sandbox's time is up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It is deleted.
    #[default]
    Kill,
    /// It is paused.
    Pause,
}

/// The states a user sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = SandboxState)]
pub enum State {
    /// Commands run.
    Running,
    /// On its way to disk.
    Pausing,
    /// On disk, memory freed.
    Paused,
    /// On its way back.
    Resuming,
    /// Being removed.
    Deleting,
}

impl State {
    /// Its name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Deleting => "deleting",
        }
    }
}

/// What is stored of a sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxData {
    /// Its id.
    pub id: String,
    /// Its template.
    pub template: String,
    /// Where its machine came from.
    pub origin: Origin,
    /// The user's own labels.
    pub metadata: BTreeMap<String, String>,
    /// Environment that every command gets.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// When it was claimed.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// Life time asked for, counted from the claim or from the last change.
    pub timeout_seconds: u64,
    /// When its time is up.
    #[serde(with = "time::serde::rfc3339")]
    pub expires_at: OffsetDateTime,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// SHA-256 of its access token, hex.
    pub token_sha256: String,
    /// VMM that runs it.
    pub vmm: String,
    /// Phases of the request that made or resumed it.
    pub timings_ms: Timings,
    /// Snapshot its machine was restored from: its template's, or a workspace's.
    pub restored_from: String,
    /// Snapshot it is paused in.
    #[serde(default)]
    pub paused_in: Option<String>,
}

/// A sandbox.
#[derive(Debug)]
pub struct Sandbox {
    // Std locks: held for a copy, never across an await.
    data: RwLock<SandboxData>,
    identity: StoredIdentity,
    state: RwLock<State>,
    agent: RwLock<Option<AgentClient>>,
    /// The machine; `None` while paused or gone. Held for as long as a transition takes: this lock
    /// is what makes transitions of one sandbox happen one after the other.
    pub(super) machine: Mutex<Option<Machine>>,
}

fn read<T: Clone>(lock: &RwLock<T>) -> T {
    lock.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
}

fn write<T>(lock: &RwLock<T>, value: T) {
    *lock.write().unwrap_or_else(std::sync::PoisonError::into_inner) = value;
}

impl Sandbox {
    /// A running sandbox.
    pub fn running(data: SandboxData, identity: StoredIdentity, machine: Machine) -> Self {
        Self {
            data: RwLock::new(data),
            identity,
            state: RwLock::new(State::Running),
            agent: RwLock::new(Some(machine.agent.clone())),
            machine: Mutex::new(Some(machine)),
        }
    }

    /// A paused sandbox, as found in the database.
    pub fn paused(data: SandboxData, identity: StoredIdentity) -> Self {
        Self {
            data: RwLock::new(data),
            identity,
            state: RwLock::new(State::Paused),
            agent: RwLock::new(None),
            machine: Mutex::new(None),
        }
    }

    /// What is stored of it.
    pub fn data(&self) -> SandboxData {
        read(&self.data)
    }

    /// Changes what is stored of it and returns the result.
    pub fn update(&self, change: impl FnOnce(&mut SandboxData)) -> SandboxData {
        let mut data = self.data.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        change(&mut data);
        live::changed();
        data.clone()
    }

    /// Its identity.
    pub fn identity(&self) -> StoredIdentity {
        self.identity.clone()
    }

    /// Its state.
    pub fn state(&self) -> State {
        read(&self.state)
    }

    pub(super) fn set_state(&self, state: State) {
        write(&self.state, state);
        live::changed();
    }

    /// Connection to its agent while it runs.
    pub fn agent(&self) -> Option<AgentClient> {
        if self.state() == State::Running { read(&self.agent) } else { None }
    }

    pub(super) fn set_agent(&self, agent: Option<AgentClient>) {
        write(&self.agent, agent);
    }
}
