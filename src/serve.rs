//! `rethaw serve`: puts the service together, runs it, and takes it down again.

use std::fs::File;
use std::future::Future;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, fcntl_lock};
use sha2::{Digest, Sha256};
use snapshotter::priority;
use snapshotter::vmm::MachineSize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uffd_handler::supervisor::{Supervisor, SupervisorConfig};

use crate::audit::Audit;
use crate::choose;
use crate::cli::network::{NetworkArgs, NetworkChoice};
use crate::cli::serve::ServeOptions;
use crate::engine::keyring::{Keyring, MasterKey};
use crate::engine::keys::{Account, Quotas};
use crate::engine::{Engine, EngineConfig};
use crate::failpoint;
use crate::http::{self, App};
use crate::listen::Listeners;
use crate::live::History;
use crate::log;
use crate::net::{NOTE, NOTES, Network, NetworkConfig};
use crate::paths::Paths;

/// Pool size of a template for which no operator has set one.
const DEFAULT_POOL_TARGET: u32 = 4;
/// How long open requests may take once the service was told to stop.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// Runs the service until SIGTERM or SIGINT.
pub fn run(options: ServeOptions) -> anyhow::Result<()> {
    log::init();
    guest_agent::client::name_requests(log::request_id);
    failpoint::arm()?;
    // Asked by a thread that is not preferred yet.
    priority::own_nice();
    if options.no_real_time {
        priority::forbid_real_time();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .on_thread_start(priority::prefer_this_thread)
        // Only those that serve requests park; those that may block do not.
        .on_thread_park(|| HURRIES.with(|hurries| hurries.call_once(priority::hurry_this_thread)))
        .build()?;
    // Not on this thread, which is no worker.
    let serving = runtime.spawn(async {
        let unix = options.unix_socket.as_deref();
        let listeners = Listeners::bind(&options.listen, unix, options.tls.clone()).await?;
        serve(options, listeners, stop_signal()?).await
    });
    runtime.block_on(serving)?
}

thread_local! {
    static HURRIES: std::sync::Once = const { std::sync::Once::new() };
}

/// Resolves when the process is asked to stop.
fn stop_signal() -> std::io::Result<impl Future<Output = &'static str>> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => "SIGTERM",
            _ = int.recv() => "SIGINT",
        }
    })
}

async fn serve(
    mut options: ServeOptions,
    listeners: Listeners,
    stop: impl Future<Output = &'static str> + Send + 'static,
) -> anyhow::Result<()> {
    let templates = std::mem::take(&mut options.templates);
    let home = &options.home;
    std::fs::create_dir_all(home).with_context(|| format!("cannot make {}", home.display()))?;
    // Held until the process ends.
    let _lock = lock_home(home)?;
    check_socket_paths(home)?;
    let paths = Paths::find()?;
    let metrics = crate::metrics::install()?;
    let key_file = home.join("api-key");
    let key = http::key_from_file(&key_file)
        .with_context(|| format!("API key file {}", key_file.display()))?;
    let audit = home.join("audit.log");
    let audit = Audit::open(&audit).with_context(|| format!("audit log {}", audit.display()))?;
    let keys = Arc::new(open_keyring(&options)?);
    let pager = Arc::new(start_pager(home, &paths, Arc::clone(&keys))?);
    let choice = choose::choose(options.vmm, home).await?;
    tracing::info!("VMM: {choice}");
    let driver = choice.driver(&paths, Arc::clone(&pager)).await?;
    let config = EngineConfig {
        home: home.clone(),
        agent_binary: paths.agent.clone(),
        size: MachineSize { vcpus: 1, memory_bytes: options.memory_mib << 20 },
        flavor: options.flavor,
        default_pool_target: options.pool_target.unwrap_or(DEFAULT_POOL_TARGET),
        pool_targets: options.pools.clone(),
        max_pool_target: options.max_pool_target,
        max_timeout: options.max_timeout,
        limits: options.limits.clone(),
        encrypt_workspaces: !options.no_encryption,
        file_backed: options.file_backed.clone(),
        working_sets: options.working_sets,
        graduate_after: options.graduate_after_seconds.map(Duration::from_secs),
        disk_budget_bytes: options.disk_budget_bytes,
    };
    let domain = options.network.domain.clone();
    let network = start_network(home, options.network.clone()).await?;
    let engine = Engine::start(config, driver, pager, keys, network).await?;
    engine.configure_templates(templates).await?;
    engine.keys().insert_file_key(&key);
    let nobody = || Arc::new(Account::all_powerful("no-auth", Quotas::default()));
    let everybody = options.no_auth.then(nobody);
    let history = Arc::new(History::default());
    let recording = tokio::spawn(Arc::clone(&history).record(Arc::clone(&engine)));
    let closing = CancellationToken::new();
    let domain = domain.map(Arc::from);
    let app =
        App { engine: Arc::clone(&engine), everybody, audit, metrics, domain, history, closing };
    run_http(listeners, app, stop).await;
    recording.abort();
    if let Some(path) = &options.unix_socket {
        let _ = std::fs::remove_file(path);
    }
    if options.keep_vms {
        engine.leave().await;
        tracing::info!("stopped; sandboxes run on and are taken back by the next service");
    } else {
        engine.shutdown().await;
        tracing::info!("stopped");
    }
    Ok(())
}

/// Networks for sandboxes, where they can be made or have to be.
async fn start_network(home: &Path, args: NetworkArgs) -> anyhow::Result<Option<Arc<Network>>> {
    let mode = args.mode.unwrap_or_default();
    if mode == NetworkChoice::Off {
        tracing::info!("sandboxes have no network: it is switched off");
        return Ok(None);
    }
    let config = NetworkConfig {
        home: home.to_owned(),
        // Beside the page server's directory, which is its own.
        note: state_dir(home).with_extension(NOTE.trim_start_matches('.')),
        network: args.range,
        dns: args.dns,
        denied: args.deny_egress,
    };
    match Network::start(config).await {
        Ok(network) => {
            let (range, v6) = network.describe();
            tracing::info!(%range, ipv6 = v6, "sandboxes have networks of their own");
            Ok(Some(network))
        }
        Err(e) if mode == NetworkChoice::On => Err(e).context("--network on"),
        Err(e) => {
            tracing::warn!("sandboxes have no network: {e}");
            Ok(None)
        }
    }
}

/// Serves until told to stop; then finishes open requests, but not for ever.
async fn run_http(listeners: Listeners, app: App, stop: impl Future<Output = &'static str>) {
    let (tell, told) = watch::channel(false);
    let closing = app.closing.clone();
    let server = listeners.serve(http::router(app), told);
    tokio::pin!(server);
    tokio::select! {
        // It has no reason to end by itself.
        () = &mut server => return,
        why = stop => tracing::info!("{why}: stopping"),
    }
    let _ = tell.send(true);
    closing.cancel();
    if tokio::time::timeout(DRAIN_DEADLINE, server).await.is_err() {
        tracing::warn!("requests still open after {DRAIN_DEADLINE:?} are dropped");
    }
}

/// One service per data directory: two would fight over every VM in it.
fn lock_home(home: &Path) -> anyhow::Result<File> {
    let path = home.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    // Of this process, and not of the open file: a child that has not loaded its program yet, on a busy
    // host, would keep the home from the next service when this one is killed.
    if fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!(
            "another rethaw service already uses {}; stop it or choose another --home",
            home.display()
        );
    }
    Ok(file)
}

/// Socket paths have a hard limit of 107 bytes; better said now than at the first VM.
fn check_socket_paths(home: &Path) -> anyhow::Result<()> {
    let longest = crate::engine::run_dir(home).join("a".repeat(20)).join("migrate.sock");
    let length = longest.as_os_str().len();
    if length > 107 {
        bail!(
            "--home {} is too long: socket paths below it would have {length} bytes, Linux allows 107",
            home.display()
        );
    }
    Ok(())
}

/// The keys of workspaces, and what they are wrapped with.
fn open_keyring(options: &ServeOptions) -> anyhow::Result<Keyring> {
    let master = match &options.key_command {
        Some(command) => {
            MasterKey::Command(command.split_whitespace().map(str::to_owned).collect())
        }
        None => {
            let default = options.home.join("master-key");
            MasterKey::from_file(options.master_key_file.as_ref().unwrap_or(&default))?
        }
    };
    Ok(Keyring::open(&options.home, master)?)
}

fn start_pager(home: &Path, paths: &Paths, keys: Arc<Keyring>) -> anyhow::Result<Supervisor> {
    let run = home.join("run");
    std::fs::create_dir_all(&run).with_context(|| format!("cannot make {}", run.display()))?;
    let mut config = SupervisorConfig::new(&paths.pager, run.join("pager.sock"));
    config.log = Some(home.join("pager.log"));
    // On a tmpfs: it is what lets VMs be found again when service and page server are killed
    // together, and it must not outlive the machine.
    let state = state_dir(home);
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&state);
    made.with_context(|| format!("cannot make {}", state.display()))?;
    config.state_dir = Some(state);
    config.keys = keys;
    config.request = log::request_id;
    Supervisor::start(config).context("the page server does not start")
}

/// One directory per home, named by its path.
fn state_dir(home: &Path) -> PathBuf {
    let path = home.canonicalize().unwrap_or_else(|_| home.to_owned());
    let digest = hex::encode(Sha256::digest(path.as_os_str().as_encoded_bytes()));
    Path::new(NOTES).join(&digest[..16])
}
