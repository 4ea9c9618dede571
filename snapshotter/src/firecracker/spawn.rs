//! Starting a Firecracker process, jailed or not, up to the moment its API answers.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

use super::api::{ApiClient, ApiError};
use super::home::{self, Access, Home, Jail, file_error};
use super::{COMMAND_DEADLINE, Firecracker, START_DEADLINE, VMM};
use crate::process::{ExitReason, Process, ProcessError};
use crate::tap;
use crate::vmm::{MachineSize, Nic, Phases, VmmError};

/// What a VM's standard output, which is the guest's serial port, becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Console {
    /// `console.log` in its run directory.
    File,
    /// Nothing: a guest could fill the host's disk with it.
    Discard,
}

/// What every VM has, booted or restored.
#[derive(Debug)]
pub(super) struct SpawnSpec<'a> {
    pub(super) id: &'a str,
    pub(super) run_dir: &'a Path,
    pub(super) root_disk: &'a Path,
    pub(super) scratch_disk: &'a Path,
    pub(super) size: MachineSize,
    pub(super) nic: &'a Nic,
    pub(super) console: Console,
}

/// A process whose API answers and that has neither booted nor loaded anything.
#[derive(Debug)]
pub(super) struct Spawned {
    // Dropped in this order: the process must be gone before its home can go.
    pub(super) process: Process,
    pub(super) api: ApiClient,
    pub(super) home: Arc<Home>,
    /// The tap to be named in API calls.
    pub(super) tap: String,
    /// How long each step took.
    pub(super) phases: Phases,
}

/// Where the VM's network is, as far as starting its process matters.
enum Network {
    /// In the service's own namespace.
    Host,
    /// A namespace with a name.
    Named(PathBuf),
    /// One that only this descriptor holds.
    Lonely(OwnedFd),
}

impl Network {
    fn path(&self) -> Option<PathBuf> {
        match self {
            Self::Host => None,
            Self::Named(path) => Some(path.clone()),
            // The jailer closes what it inherits, so it cannot be handed the descriptor itself.
            Self::Lonely(fd) => {
                Some(format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd()).into())
            }
        }
    }
}

impl Firecracker {
    /// The home of VM `id`, with a user of its own when it is to be jailed.
    fn home(&self, id: &str, run_dir: &Path) -> Result<Home, VmmError> {
        let jail = match &self.config.jail {
            None => None,
            Some(config) => {
                let uid = self.uids.take().ok_or_else(|| {
                    VmmError::Unsupported("all user ids for VMs are in use".to_owned())
                })?;
                let cgroup_parent = config.cgroup_parent.clone();
                Some(Jail { uid, cgroups: self.cgroups.clone(), cgroup_parent })
            }
        };
        Ok(Home::locate(id, run_dir, &self.config.binaries.firecracker, jail))
    }

    /// Makes the home, starts the process in it, and waits until its API answers. `fill` puts in
    /// what only the caller knows.
    pub(super) async fn spawn(
        &self,
        spec: &SpawnSpec<'_>,
        fill: impl FnOnce(&Home) -> Result<(), VmmError>,
    ) -> Result<Spawned, VmmError> {
        let mut phases = Phases::new();
        let mut since = Instant::now();
        let mut done = |phase| {
            let now = Instant::now();
            phases.push((phase, now - std::mem::replace(&mut since, now)));
        };
        let home = self.home(spec.id, spec.run_dir)?;
        home.create()?;
        home.put(spec.root_disk, home::ROOT_DISK, Access::ReadOnly)?;
        home.put(spec.scratch_disk, home::SCRATCH_DISK, Access::Writable)?;
        fill(&home)?;
        done("home");
        let (network, tap) = network(spec, home.uid())?;
        done("network");
        let watch = watch(home.root()).map_err(file_error("cannot watch", home.root()))?;
        let process = self.start(spec, &home, &network)?;
        let api = ApiClient::new(home.path(home::API), self.identity.version);
        done("start");
        let mut spawned =
            Spawned { process, api, home: Arc::new(home), tap, phases: Phases::new() };
        let answered = tokio::time::timeout(START_DEADLINE, answering(&spawned.api, &watch));
        tokio::select! {
            biased;
            answered = answered => answered
                .map_err(|_| VmmError::Timeout {
                    vmm: VMM,
                    id: spec.id.to_owned(),
                    step: "its start",
                    after: START_DEADLINE,
                    log: log_tail(spec.run_dir, &spawned.home),
                })?
                .map_err(|e| api_error(spec.id, "its start", e))?,
            reason = spawned.process.exited() => {
                return Err(died(spec.id, spec.run_dir, &spawned.home, reason));
            }
        }
        // Closing an inotify descriptor waits for all readers in the kernel, ten milliseconds or more,
        // which nobody else has to.
        let watch = watch.into_inner();
        drop(tokio::task::spawn_blocking(move || drop(watch)));
        done("api");
        spawned.phases = phases;
        Ok(spawned)
    }

    fn start(
        &self,
        spec: &SpawnSpec<'_>,
        home: &Home,
        network: &Network,
    ) -> Result<Process, VmmError> {
        let own_args = ["--api-sock", home::API, "--log-path", home::LOG, "--level", "Warn"];
        let binaries = &self.config.binaries;
        let command = if let Some(jail) = home.jail() {
            let uid = jail.uid.number().to_string();
            let mut command = Command::new(&binaries.jailer);
            command.args(["--id", spec.id, "--uid", &uid, "--gid", &uid]);
            command.arg("--exec-file").arg(&binaries.firecracker);
            command.arg("--chroot-base-dir").arg(home.top());
            command.args(jail.cgroups.jailer_args(&jail.cgroup_parent, spec.size));
            // A guest can make Firecracker log without end; this ends the guest instead.
            command.arg("--resource-limit").arg(format!("fsize={}", largest_file(spec)?));
            if let Some(path) = network.path() {
                command.arg("--netns").arg(path);
            }
            // The jailer passes the id on.
            command.arg("--").args(own_args);
            command
        } else {
            let mut command = Command::new(&binaries.firecracker);
            command.args(["--id", spec.id]).args(own_args).current_dir(home.root());
            command
        };
        let stdout = match spec.console {
            Console::Discard => Path::new("/dev/null").to_owned(),
            Console::File => spec.run_dir.join("console.log"),
        };
        let stdout = std::fs::File::options()
            .append(true)
            .create(true)
            .open(&stdout)
            .map_err(file_error("cannot open", &stdout))?;
        let mut command = command;
        command.env_clear();
        let log = log_path(spec.run_dir);
        let spawn = move || Process::spawn(command, vec![(stdout.into(), 1)], &log);
        let spawned = match network.path() {
            // Unjailed: a process starts in the namespace of the thread that starts it.
            Some(path) if home.jail().is_none() => {
                let runtime = tokio::runtime::Handle::current();
                std::fs::File::open(path)
                    .and_then(|netns| {
                        tap::inside(&netns, || {
                            let _context = runtime.enter();
                            Ok(spawn())
                        })
                    })
                    .unwrap_or_else(|source| {
                        let program = binaries.firecracker.display().to_string();
                        Err(ProcessError::Spawn { program, source })
                    })
            }
            _ => spawn(),
        };
        spawned.map_err(|source| VmmError::Process {
            vmm: VMM,
            id: spec.id.to_owned(),
            source,
            log: String::new(),
        })
    }
}

/// No file that Firecracker has a reason to write gets larger: disk, memory, a log.
fn largest_file(spec: &SpawnSpec<'_>) -> Result<u64, VmmError> {
    const LOG: u64 = 64 << 20;
    let disk = std::fs::metadata(spec.scratch_disk);
    let disk = disk.map_err(file_error("cannot find", spec.scratch_disk))?.len();
    Ok(disk.max(spec.size.memory_bytes).max(LOG))
}

/// Sees to it that the VM's tap is there and that its user, and nobody else, may open it.
fn network(spec: &SpawnSpec<'_>, uid: u32) -> Result<(Network, String), VmmError> {
    let path = Path::new("/dev/net/tun");
    let Some(tap) = &spec.nic.tap else {
        let name = "tap0";
        let netns = tap::lonely(name, uid).map_err(file_error("cannot make a tap with", path))?;
        return Ok((Network::Lonely(netns), name.to_owned()));
    };
    tap::give(tap, spec.nic.netns.as_deref(), uid)
        .map_err(file_error("cannot give a tap away with", path))?;
    let network = spec.nic.netns.clone().map_or(Network::Host, Network::Named);
    Ok((network, tap.clone()))
}

/// Tells when something appears in `dir`.
#[allow(unsafe_code)]
fn watch(dir: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    inotify::add_watch(&fd, dir, WatchFlags::CREATE)?;
    // SAFETY: an `OwnedFd` is open and stays the same descriptor until it is dropped.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// Waits for the API socket and asks it something.
async fn answering(api: &ApiClient, watch: &AsyncFd<OwnedFd>) -> Result<(), ApiError> {
    /// Between the socket's appearance and its `listen` there is no event.
    const BIND_TO_LISTEN: Duration = Duration::from_micros(200);
    loop {
        match api.instance(COMMAND_DEADLINE).await {
            Ok(_) => return Ok(()),
            Err(ApiError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                let io = |source| ApiError::Io { call: "waiting for the socket".into(), source };
                let mut ready = watch.readable().await.map_err(io)?;
                let mut events = [0_u8; 4096];
                while rustix::io::read(watch.get_ref(), &mut events).is_ok_and(|n| n > 0) {}
                ready.clear_ready();
            }
            Err(ApiError::Io { source, .. })
                if source.kind() == io::ErrorKind::ConnectionRefused =>
            {
                tokio::time::sleep(BIND_TO_LISTEN).await;
            }
            Err(e) => return Err(e),
        }
    }
}

fn log_path(run_dir: &Path) -> PathBuf {
    run_dir.join("vmm.log")
}

/// The last lines of the jailer's and Firecracker's logs, ready to be appended to an error.
pub(super) fn log_tail(run_dir: &Path, home: &Home) -> String {
    let mut lines = Vec::new();
    for path in [log_path(run_dir), home.path(home::LOG)] {
        let text = std::fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let tail: Vec<&str> = text.lines().rev().filter(|l| !l.trim().is_empty()).take(3).collect();
        lines.extend(tail.into_iter().rev().map(str::to_owned));
    }
    if lines.is_empty() {
        String::new()
    } else {
        format!("; its log ends with: {}", lines.join(" | "))
    }
}

/// The process ended when it should not have.
pub(super) fn died(id: &str, run_dir: &Path, home: &Home, reason: ExitReason) -> VmmError {
    VmmError::Process {
        vmm: VMM,
        id: id.to_owned(),
        source: ProcessError::Died(reason),
        log: log_tail(run_dir, home),
    }
}

/// An API call failed; if that is because the process ended, says so instead.
pub(super) async fn explain(
    (id, run_dir): (&str, &Path),
    spawned: &Spawned,
    step: &'static str,
    error: ApiError,
) -> VmmError {
    /// A socket breaks a moment before its process can be waited for.
    const SOON: Duration = Duration::from_millis(200);
    if matches!(error, ApiError::Io { .. })
        && let Ok(reason) = tokio::time::timeout(SOON, spawned.process.exited()).await
    {
        return died(id, run_dir, &spawned.home, reason);
    }
    let tail = log_tail(run_dir, &spawned.home);
    match api_error(id, step, error) {
        VmmError::Timeout { vmm, id, step, after, .. } => {
            VmmError::Timeout { vmm, id, step, after, log: tail }
        }
        other => other,
    }
}

/// An API call failed.
pub(super) fn api_error(id: &str, step: &'static str, error: ApiError) -> VmmError {
    let id = id.to_owned();
    match error {
        ApiError::UnsupportedField(e) => VmmError::Unsupported(e.to_string()),
        ApiError::Refused { call, fault_message, .. } => {
            VmmError::Refused { vmm: VMM, id, command: call, message: fault_message }
        }
        ApiError::Timeout { after, .. } => {
            VmmError::Timeout { vmm: VMM, id, step, after, log: String::new() }
        }
        ApiError::Io { source, .. } => VmmError::Control { vmm: VMM, id, source },
        e @ ApiError::Protocol { .. } => {
            VmmError::Control { vmm: VMM, id, source: io::Error::other(e.to_string()) }
        }
    }
}
