//! What the agent knows and remembers, all of it on one thread.
//!
//! ```text
//! Live -- settle --> Settled -- identity --> Live
//!   \--- freeze ---> Frozen -- identity or resume --> Live
//!                    Settled, Frozen -- identity fails --> IdentityFailed (for good)
//! ```
//!
//! The state is kept in a file as well: an agent that is started again, in a machine that waits for
//! its identity, must not take it for a live one.

use crate::cgroup::Workload;
use crate::exec::Processes;
use crate::log::{self, Log};
use crate::notify::Watchers;
use crate::server::ApiError;
use crate::usage::CpuTimes;
use crate::wire::{AgentState, Health, codes};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where the state outlives the agent; gone with the next boot, as it should be.
const STATE: &str = "/run/rethaw/state";
/// Longer than any state's name.
const STATE_LENGTH: usize = 32;
const GENERATION: &str = "/run/rethaw/generation";

/// Where the agent finds the system it looks after.
#[derive(Debug, Clone)]
pub struct Config {
    /// Prefix of the files it reads and writes for itself; `/` outside of tests.
    pub root: PathBuf,
    /// Mount point of cgroup v2, when there is one.
    pub cgroup: Option<PathBuf>,
    /// Its log, under the prefix.
    pub log: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        let cgroup = PathBuf::from("/sys/fs/cgroup");
        let unified = cgroup.join("cgroup.procs").exists();
        Self { root: PathBuf::from("/"), cgroup: unified.then_some(cgroup), log: log::PATH.into() }
    }
}

/// The agent.
#[derive(Debug)]
pub struct Agent {
    root: PathBuf,
    state: Cell<AgentState>,
    /// Generation of the identity last applied.
    pub generation: RefCell<Option<String>>,
    /// What was made ready for the identity to come.
    pub ready: RefCell<crate::identity::Ready>,
    /// Environment of every command, from the claim.
    pub env: RefCell<BTreeMap<String, String>>,
    /// The group every command runs in.
    pub workload: Workload,
    /// Commands that run.
    pub processes: Processes,
    /// Folders somebody asked to be watched.
    pub watchers: Watchers,
    /// The processor's times when they were last asked for.
    pub cpu_times: Cell<CpuTimes>,
    /// What it was asked.
    pub log: Log,
}

fn under(root: &Path, path: impl AsRef<Path>) -> PathBuf {
    let path = path.as_ref();
    root.join(path.strip_prefix("/").unwrap_or(path))
}

impl Agent {
    /// An agent of a machine that has just booted, or the successor of one that has ended.
    pub fn new(config: Config) -> Self {
        let read = |path: &str| fs::read_to_string(under(&config.root, path)).ok();
        // A state that cannot be understood is none that commands may be run in.
        let state = read(STATE).map_or(AgentState::Live, |text| {
            serde_json::from_str(&text).unwrap_or(AgentState::IdentityFailed)
        });
        let generation = match state {
            AgentState::Live => read(GENERATION).map(|text| text.trim_end().to_owned()),
            _ => None,
        };
        Self {
            log: Log::new(under(&config.root, &config.log)),
            root: config.root,
            state: Cell::new(state),
            generation: RefCell::new(generation),
            ready: RefCell::default(),
            env: RefCell::new(BTreeMap::new()),
            workload: Workload::new(config.cgroup),
            processes: Processes::default(),
            watchers: Watchers::default(),
            cpu_times: Cell::default(),
        }
    }

    /// Prefix of the system's files.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where `path`, which is absolute, lies under the prefix.
    pub fn path(&self, path: &str) -> PathBuf {
        under(&self.root, path)
    }

    /// What the agent will do now.
    pub fn state(&self) -> AgentState {
        self.state.get()
    }

    /// Counts the machine as failed for as long as this agent lives and nobody says otherwise. In
    /// the file it stays frozen, which lets nobody in either, but a new identity.
    pub fn distrust(&self) {
        self.state.set(AgentState::IdentityFailed);
    }

    /// Enters another state.
    ///
    /// # Errors
    /// It cannot be kept; the agent is in the old one still.
    pub fn set_state(&self, state: AgentState) -> io::Result<()> {
        let path = self.path(STATE);
        let mut text = serde_json::to_string(&state)?;
        // Always of one length: a restore has no time for cutting a file short.
        text.extend(std::iter::repeat_n(' ', STATE_LENGTH.saturating_sub(text.len())));
        let open = || OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(self.path("/run/rethaw"))?;
                open()?
            }
            result => result?,
        };
        file.write_all_at(text.as_bytes(), 0)?;
        self.state.set(state);
        Ok(())
    }

    /// Refuses unless commands and files may be served.
    ///
    /// # Errors
    /// 409 `identity_pending` or `identity_failed`.
    pub fn require_live(&self) -> Result<(), ApiError> {
        match self.state() {
            AgentState::Live => Ok(()),
            AgentState::Settled | AgentState::Frozen => Err(ApiError::new(
                409,
                codes::IDENTITY_PENDING,
                "this machine is frozen and has not been brought back yet",
            )),
            AgentState::IdentityFailed => Err(ApiError::new(
                409,
                codes::IDENTITY_FAILED,
                "this machine's identity could not be made its own; it must be destroyed",
            )),
        }
    }

    /// Answer to `GET /health`.
    pub fn health(&self) -> Health {
        Health {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: self.generation.borrow().clone(),
            state: self.state(),
            uptime_seconds: crate::clock::uptime().as_secs_f64(),
            processes: self.processes.count() as u32,
        }
    }
}
