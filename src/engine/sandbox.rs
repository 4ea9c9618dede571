//! One sandbox: what its user sees, and the machine behind it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use guest_agent::client::AgentClient;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::Mutex as AsyncMutex;
use utoipa::ToSchema;

use super::SandboxError;
use super::db::StoredIdentity;
use super::lifecycle::Timings;
use super::machine::Machine;
use super::quota::Size;
use super::state::Event;
pub use super::state::State;
use crate::live;
use crate::net::Addresses;
use crate::net::policy::Policy;

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

/// What is stored of a sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxData {
    /// Its id.
    pub id: String,
    /// Its template.
    pub template: String,
    /// Where its machine came from.
    pub origin: Origin,
    /// Id of the API key that made it.
    #[serde(default)]
    pub owner: Option<String>,
    /// What it takes.
    #[serde(default)]
    pub size: Size,
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
    /// What its access token is made from, with the service's key.
    #[serde(default)]
    pub token_nonce: String,
    /// VMM that runs it.
    pub vmm: String,
    /// Phases of the request that made or resumed it.
    pub timings_ms: Timings,
    /// Snapshot its machine was restored from: its template's, or a workspace's.
    pub restored_from: String,
    /// Snapshot it is paused in.
    #[serde(default)]
    pub paused_in: Option<String>,
    /// Name of the key that its snapshots are encrypted with, from its first pause on.
    #[serde(default)]
    pub key: Option<String>,
    /// Its time is also up when it was not used for this long.
    #[serde(default)]
    pub idle_timeout_seconds: Option<u64>,
    /// Name of the request that it was made for, when that one can be sent again.
    #[serde(default)]
    pub made_by: Option<String>,
    /// What it may reach, and who may reach it.
    #[serde(default)]
    pub network: Policy,
    /// Where it is reached; of its last run while it is paused.
    #[serde(default)]
    pub addresses: Option<Addresses>,
}

/// When a sandbox was used last, and how often it is in use now.
#[derive(Debug)]
struct Activity {
    last: Mutex<Instant>,
    open: AtomicUsize,
}

impl Activity {
    fn new() -> Arc<Self> {
        Arc::new(Self { last: Mutex::new(Instant::now()), open: AtomicUsize::new(0) })
    }

    fn touch(&self) {
        *self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Instant::now();
    }

    fn last(&self) -> Instant {
        if self.open.load(Ordering::Relaxed) > 0 {
            return Instant::now();
        }
        *self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A sandbox is in use, and not idle, for as long as one of these lives.
#[derive(Debug)]
pub struct InUse(Arc<Activity>);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.touch();
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A sandbox.
#[derive(Debug)]
pub struct Sandbox {
    // Std locks: held for a copy, never across an await.
    data: RwLock<SandboxData>,
    identity: StoredIdentity,
    state: RwLock<State>,
    agent: RwLock<Option<AgentClient>>,
    activity: Arc<Activity>,
    /// The machine; `None` while paused or gone. Held for as long as a transition takes: this lock
    /// is what makes transitions of one sandbox happen one after the other.
    pub(super) machine: AsyncMutex<Option<Machine>>,
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
            activity: Activity::new(),
            machine: AsyncMutex::new(Some(machine)),
        }
    }

    /// A paused sandbox, as found in the database.
    pub fn paused(data: SandboxData, identity: StoredIdentity) -> Self {
        Self {
            data: RwLock::new(data),
            identity,
            state: RwLock::new(State::Paused),
            agent: RwLock::new(None),
            activity: Activity::new(),
            machine: AsyncMutex::new(None),
        }
    }

    /// What is stored of it.
    pub fn data(&self) -> SandboxData {
        read(&self.data)
    }

    /// Looks at what is stored of it without a copy.
    pub fn with_data<T>(&self, look: impl FnOnce(&SandboxData) -> T) -> T {
        look(&self.data.read().unwrap_or_else(std::sync::PoisonError::into_inner))
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

    /// Changes the state as [`State::after`] has it; what the table does not have is refused.
    pub(super) fn apply(&self, event: Event) -> Result<State, SandboxError> {
        let mut state = self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        match state.after(event) {
            Some(next) => {
                *state = next;
                drop(state);
                live::changed();
                Ok(next)
            }
            None => {
                let was = *state;
                drop(state);
                Err(self.wrong_state(was, event))
            }
        }
    }

    /// Refuses what needs another state than the present one.
    pub(super) fn expect(&self, wanted: State, action: &'static str) -> Result<(), SandboxError> {
        let (id, state) = (self.data().id, self.state());
        match state {
            _ if state == wanted => Ok(()),
            State::Deleting => Err(SandboxError::NotFound(id)),
            _ => Err(SandboxError::WrongState { id, state, action, wanted: wanted.as_str() }),
        }
    }

    fn wrong_state(&self, state: State, event: Event) -> SandboxError {
        let id = self.data().id;
        if state == State::Deleting {
            return SandboxError::NotFound(id);
        }
        SandboxError::WrongState { id, state, action: event.as_str(), wanted: event.wanted() }
    }

    /// Ends a transition. That it can end like this was made sure of when it began.
    pub(super) fn end(&self, event: Event) {
        if let Err(e) = self.apply(event) {
            tracing::error!("{e}");
        }
    }

    /// Connection to its agent while it runs. Whoever asks uses the sandbox; hold an
    /// [`Sandbox::in_use`] besides for what lasts.
    pub fn agent(&self) -> Option<AgentClient> {
        self.activity.touch();
        if self.state() == State::Running { read(&self.agent) } else { None }
    }

    /// Keeps it from being idle.
    pub fn in_use(&self) -> InUse {
        self.activity.open.fetch_add(1, Ordering::Relaxed);
        InUse(Arc::clone(&self.activity))
    }

    /// When its time is up, as things are now: at its end, or when it has been idle for too long.
    pub(super) fn ends_at(&self) -> Instant {
        let data = self.data();
        let left = data.expires_at - OffsetDateTime::now_utc();
        let end = Instant::now() + Duration::try_from(left).unwrap_or_default();
        let idle = data.idle_timeout_seconds.map(Duration::from_secs);
        idle.map_or(end, |idle| end.min(self.activity.last() + idle))
    }

    /// It is used from now on, whatever was before.
    pub(super) fn touch(&self) {
        self.activity.touch();
    }

    pub(super) fn set_agent(&self, agent: Option<AgentClient>) {
        write(&self.agent, agent);
    }
}
