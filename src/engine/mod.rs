//! The engine: everything the service does, without a word of HTTP.
//!
//! ```text
//!              templates --ready--> pools --take--> claims --> sandboxes --> gone
//!                 |                   ^                           |
//!   bake (first start)                +---- lifecycle::restore ---+ miss: restored on the spot
//! ```
//!
//! [`Engine::start`] opens the state, takes back what an earlier service left, and sees to it that
//! the template `base` exists; from then on pools keep themselves full and the methods of
//! [`Engine`] are what the API calls.

mod bake;
pub mod budget;
pub mod build;
mod claim;
pub mod configured;
mod context;
pub mod db;
mod enroll;
mod fork;
pub mod gc;
pub mod identity;
pub mod ids;
pub mod inputs;
pub mod keyring;
pub mod keys;
pub mod lifecycle;
mod lint;
pub mod machine;
mod parked;
mod pause;
mod pool;
mod pools;
pub mod quota;
mod recover;
mod remove;
pub mod sandbox;
mod snapshots;
mod spare;
pub mod state;
mod stop;
pub mod template;
pub mod templates;
mod to_the_end;
mod token;
mod trial;
mod ttl;
mod workspace;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dashmap::DashMap;
use snapshotter::image::Flavor;
use snapshotter::store::Store;
use snapshotter::vmm::{Driver, MachineSize};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use uffd_handler::supervisor::Supervisor;

pub use claim::{CreateError, CreateRequest};
use context::RestoreContext;
use db::{Db, DbError};
use inputs::Inputs;
use keyring::Keyring;
use keys::{Account, Keys, Quotas};
pub use pause::{TokenChoice, TransitionError};
use pool::Pool;
pub use pool::PoolNumbers;
use sandbox::{Sandbox, State};
pub use snapshots::SandboxSnapshot;
use template::Template;
use token::TokenKey;
pub use workspace::WorkspaceError;

use crate::net::Network;
use crate::net::policy::Policy;

/// What the engine needs to start.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Directory of all state and artefacts.
    pub home: PathBuf,
    /// Static guest agent, to be put into guest images.
    pub agent_binary: PathBuf,
    /// Size of `base`'s machine.
    pub size: MachineSize,
    /// Kernel flavor of `base`.
    pub flavor: Flavor,
    /// Pool size of a template for which no operator has set one.
    pub default_pool_target: u32,
    /// The same for single templates.
    pub pool_targets: BTreeMap<String, u32>,
    /// The largest target a pool may be given.
    pub max_pool_target: u32,
    /// The longest life time a sandbox may ask for.
    pub max_timeout: Duration,
    /// Whether paused workspaces are encrypted, each with a key of its own.
    pub encrypt_workspaces: bool,
    /// Templates whose clones map the memory file instead of using the page server.
    pub file_backed: BTreeSet<String>,
    /// Whether working sets are put in place ahead of demand.
    pub working_sets: bool,
    /// How long a sandbox lives until all its memory is put in place.
    pub graduate_after: Option<Duration>,
    /// How much all sandboxes together may have.
    pub limits: Quotas,
    /// What snapshots and uploads may take on disk; `None` for as much as there is.
    pub disk_budget_bytes: Option<u64>,
}

/// Where VM directories are.
pub fn run_dir(home: &Path) -> PathBuf {
    home.join("run").join("vm")
}

/// The engine.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    store: Store,
    inputs: Inputs,
    pager: Arc<Supervisor>,
    tokens: TokenKey,
    context: RestoreContext,
    templates: DashMap<String, Arc<Template>>,
    pools: DashMap<String, Arc<Pool>>,
    sandboxes: DashMap<String, Arc<Sandbox>>,
    keys: Keys,
    // All sandboxes together, as far as quotas go.
    limits: Arc<Account>,
    expiries: ttl::Expiries,
    // Snapshots in use by operations that no sandbox shows yet, and by how many.
    pinned: Mutex<HashMap<String, u32>>,
    snapshots: DashMap<String, Arc<SandboxSnapshot>>,
    // One build at a time: they share the host with everybody's sandboxes.
    build_slot: Semaphore,
    // Held by what adds or removes templates.
    template_changes: tokio::sync::Mutex<()>,
    // Counts claims under way, so that refill can wait for them.
    claims: watch::Sender<u32>,
    tasks: Mutex<JoinSet<()>>,
    started: Instant,
}

/// Why the engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state database.
    #[error(transparent)]
    Db(#[from] DbError),
    /// A directory or a file in it.
    #[error("cannot use {path:?}: {source}")]
    Directory {
        /// The directory or file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
}

/// Why a request about one sandbox failed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// There is none with this id.
    #[error("no sandbox {0:?}")]
    NotFound(String),
    /// It is in a state that does not allow this.
    #[error("sandbox {id} is {state}, {action} needs it to be {wanted}", state = state.as_str())]
    WrongState {
        /// The sandbox.
        id: String,
        /// Its state.
        state: State,
        /// What was asked for.
        action: &'static str,
        /// The state it needs.
        wanted: &'static str,
    },
    /// The state database.
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Why a sandbox's network is as it was.
#[derive(Debug, thiserror::Error)]
pub enum NetworkChangeError {
    /// Not there.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The rules could not be changed.
    #[error(transparent)]
    Network(#[from] crate::net::NetworkError),
}

impl Engine {
    /// Opens the state below `config.home` and brings everything up; `base` may still be baking
    /// when this returns.
    pub async fn start(
        config: EngineConfig,
        driver: Arc<dyn Driver>,
        pager: Arc<Supervisor>,
        keys: Arc<Keyring>,
        network: Option<Arc<Network>>,
    ) -> Result<Arc<Self>, StartError> {
        let dir = |path: &Path| {
            let path = path.to_owned();
            move |source| StartError::Directory { path, source }
        };
        let store = Store::open(&config.home).map_err(dir(&config.home))?;
        let inputs = Inputs::open(&config.home).map_err(dir(&config.home))?;
        let run = run_dir(&config.home);
        std::fs::create_dir_all(&run).map_err(dir(&run))?;
        let db = Db::open(&config.home.join("state.db"))?;
        let api_keys = Keys::load(db.clone()).await?;
        let limits = Arc::new(Account::all_powerful("the service", config.limits.clone()));
        let key = config.home.join(token::FILE);
        let tokens = TokenKey::open(&key).map_err(dir(&key))?;
        let engine = Arc::new(Self {
            keys: api_keys,
            limits,
            tokens,
            context: RestoreContext {
                driver,
                db,
                run,
                keys,
                file_backed: Arc::new(config.file_backed.clone()),
                working_sets: config.working_sets,
                network,
            },
            config,
            store,
            inputs,
            pager,
            templates: DashMap::new(),
            pools: DashMap::new(),
            sandboxes: DashMap::new(),
            expiries: ttl::Expiries::default(),
            pinned: Mutex::new(HashMap::new()),
            snapshots: DashMap::new(),
            build_slot: Semaphore::new(1),
            template_changes: tokio::sync::Mutex::new(()),
            claims: watch::Sender::new(0),
            tasks: Mutex::new(JoinSet::new()),
            started: Instant::now(),
        });
        engine.recover().await?;
        engine.load_snapshots().await?;
        engine.drop_orphans().await;
        engine.watch_pager();
        if let Some(network) = engine.network() {
            engine.spawn(Arc::clone(network).keep_ready(engine.claims.subscribe()));
        }
        let ttl = Arc::clone(&engine);
        engine.spawn(async move { ttl.expire_sandboxes().await });
        let base = engine.add_base();
        engine.load_templates().await?;
        let baking = Arc::clone(&engine);
        engine.spawn(async move { baking.ensure_base(base).await });
        Ok(engine)
    }

    /// Runs a task that ends with the engine.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tasks.spawn(task);
        // Those that ended are forgotten, or the set would grow with every sandbox.
        while tasks.try_join_next().is_some() {}
    }

    /// What it was started with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Durable state.
    pub fn db(&self) -> &Db {
        &self.context.db
    }

    /// The API keys.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// The VMM driver.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.context.driver
    }

    /// Networks of VMs, where they can be made.
    pub fn network(&self) -> Option<&Arc<Network>> {
        self.context.network.as_ref()
    }

    /// Uploaded archives.
    pub fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    /// The page server's supervisor.
    pub fn pager(&self) -> &Arc<Supervisor> {
        &self.pager
    }

    /// When it was started.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Every template, by name.
    pub fn templates(&self) -> Vec<Arc<Template>> {
        let mut all: Vec<_> = self.templates.iter().map(|t| Arc::clone(t.value())).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// One template.
    pub fn template(&self, name: &str) -> Option<Arc<Template>> {
        self.templates.get(name).map(|t| Arc::clone(t.value()))
    }

    /// Every sandbox, newest first.
    pub fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        let mut all: Vec<_> = self.sandboxes.iter().map(|s| Arc::clone(s.value())).collect();
        all.sort_by_cached_key(|s| {
            let data = s.data();
            (std::cmp::Reverse(data.created_at), data.id)
        });
        all
    }

    /// One sandbox.
    pub fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, SandboxError> {
        let found = self.sandboxes.get(id).map(|s| Arc::clone(s.value()));
        found.ok_or_else(|| SandboxError::NotFound(id.to_owned()))
    }

    /// A sandbox's access token; `None` for one that was made before tokens could be said again.
    pub fn access_token(&self, sandbox: &Sandbox) -> Option<String> {
        self.tokens.again(&sandbox.data().token_nonce).map(|token| token.secret)
    }

    /// Changes when a running sandbox's time is up, counted from now. A paused one has no end to
    /// change.
    pub async fn set_timeout(&self, id: &str, timeout: Duration) -> Result<(), SandboxError> {
        let sandbox = self.sandbox(id)?;
        // A transition under way writes the same row, and may end in another state.
        let _transition = sandbox.machine.lock().await;
        sandbox.expect(State::Running, "timeout")?;
        let expires_at = time::OffsetDateTime::now_utc() + timeout;
        let data = sandbox.update(|d| {
            d.timeout_seconds = timeout.as_secs();
            d.expires_at = expires_at;
        });
        self.context.db.vm_sandbox(id, db::Stage::Claimed, &data).await?;
        self.expiries.set(id, sandbox.ends_at());
        Ok(())
    }

    /// Changes what a sandbox may reach, and who may reach it.
    pub async fn set_network(
        &self,
        id: &str,
        policy: Policy,
    ) -> Result<Arc<Sandbox>, NetworkChangeError> {
        let sandbox = self.sandbox(id)?;
        // Held: a pause or a resume takes the policy with it, old or new.
        let machine = sandbox.machine.lock().await;
        let stage = match sandbox.state() {
            State::Deleting => return Err(SandboxError::NotFound(id.to_owned()).into()),
            State::Paused => db::Stage::Paused,
            _ => db::Stage::Claimed,
        };
        let before = sandbox.data().network;
        let data = sandbox.update(|d| d.network = policy.clone());
        self.context.db.vm_sandbox(id, stage, &data).await.map_err(SandboxError::from)?;
        if let Some(rules) = machine.as_ref().and_then(machine::Machine::rules)
            && let Err(e) = rules.set_policy(&policy).await
        {
            let data = sandbox.update(|d| d.network = before);
            self.context.db.vm_sandbox(id, stage, &data).await.map_err(SandboxError::from)?;
            return Err(e.into());
        }
        drop(machine);
        Ok(sandbox)
    }

    /// What of a running sandbox's packets passed and what did not.
    pub async fn packets(
        &self,
        sandbox: &Sandbox,
    ) -> Result<Option<Vec<(String, crate::net::Count)>>, NetworkChangeError> {
        let rules = {
            let machine = sandbox.machine.lock().await;
            machine.as_ref().and_then(machine::Machine::rules)
        };
        match rules {
            Some(rules) => Ok(Some(rules.counters().await?)),
            None => Ok(None),
        }
    }
}
