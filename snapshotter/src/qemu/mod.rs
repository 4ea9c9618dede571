//! The QEMU driver: `microvm` machines, on any host.
//!
//! Boot: guest memory is a shared mapping of the file that becomes the snapshot's memory, so a
//! snapshot writes device state only (`x-ignore-shared`) and copies nothing.
//!
//! Restore: guest memory is a memfd that this process made. A preload shim hands its userfaultfd to
//! [`crate::vmm::RestoreSpec::memory`]'s page server with Firecracker's handshake the moment QEMU
//! maps it; from there on the page server does not know which VMM it serves.
//!
//! Control sockets are bound and listening before QEMU starts and inherited by it, so that nothing
//! ever waits for a socket to appear.

mod args;
mod blank;
mod line;
mod qmp;
mod shell;
mod vm;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use uffd_handler::supervisor::Supervisor;

use crate::host::{self, Accelerator};
use crate::priority;
use crate::process::Process;
use crate::tap;
use crate::vmm::{
    BootSpec, Compat, Driver, MemoryBackend, Priority, RestoreSpec, Shell, Vm, VmRecord, VmmError,
    VmmKind,
};
use args::{AGENT_FD, LINE_FD, Machine, Memory, QMP_FD, Start};
use blank::{Blanks, Launch};
use qmp::{Qmp, QmpError};

const VMM: &str = "qemu";
const LINE_SOCKET: &str = "line.sock";

/// How long QEMU may take for one control command; it answers in well under a millisecond unless
/// its main loop is stuck.
const COMMAND_DEADLINE: Duration = Duration::from_secs(5);
/// How long QEMU may take to start.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// How long device state may take to load or to be written.
const STATE_DEADLINE: Duration = Duration::from_secs(15);
/// How long a killed process may take to be gone; beyond it the kernel is in trouble, not QEMU.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Kernel parameters of an emulated guest. It may fail to calibrate its TSC against emulated timers
/// and hang, hence the frequency, and no check of the timer.
const TCG_CMDLINE: &str = "no_timer_check";

/// Where the driver finds what it needs.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// `qemu-system-x86_64`.
    pub binary: PathBuf,
    /// `librethaw_uffd_shim.so`.
    pub shim: PathBuf,
    /// How guest code is executed.
    pub accelerator: Accelerator,
}

/// The driver.
#[derive(Debug)]
pub struct Qemu {
    config: QemuConfig,
    compat: Compat,
    pager: Arc<Supervisor>,
    blanks: Arc<Blanks>,
}

impl Qemu {
    /// Asks the binary for its version and keeps it for [`Driver::compat`].
    pub async fn new(config: QemuConfig, pager: Arc<Supervisor>) -> Result<Self, VmmError> {
        let version = version(&config.binary).await?;
        let mut facts = host::facts(config.accelerator);
        facts.insert("vmm_version".to_owned(), version);
        facts.insert("machine".to_owned(), args::fingerprint(config.accelerator));
        let compat = Compat { vmm: VmmKind::Qemu, facts };
        Ok(Self { config, compat, pager, blanks: Arc::default() })
    }

    /// Starts QEMU; for a restore, one that was started ahead where there is one.
    fn spawn(
        &self,
        id: &str,
        run_dir: &Path,
        machine: &Machine<'_>,
        mut fds: Vec<(OwnedFd, i32)>,
        env: Vec<(&'static str, String)>,
        background: bool,
    ) -> Result<Process, VmmError> {
        let restore = matches!(machine.start, Start::Incoming);
        let mut sockets = vec![("qmp.sock", QMP_FD), ("agent.sock", AGENT_FD)];
        let mut args = machine.args();
        if restore {
            sockets.push((LINE_SOCKET, LINE_FD));
            args.extend(args::line_monitor());
        }
        for (name, number) in sockets {
            fds.push((listen(&run_dir.join(name))?.into(), number));
        }
        let netns = machine.nic.netns.as_ref().map(|path| {
            std::fs::File::open(path).map(OwnedFd::from).map_err(|source| VmmError::File {
                what: "cannot open the network namespace",
                path: path.clone(),
                source,
            })
        });
        let launch = Launch {
            program: &self.config.binary,
            args,
            env,
            directory: run_dir,
            fds,
            netns: netns.transpose()?,
            log: log_path(run_dir),
            background,
        };
        if !restore {
            return start(id, launch);
        }
        let process = match self.blanks.launch(&launch) {
            Some(process) => process,
            None => start(id, launch)?,
        };
        self.blanks.refill(&self.config.binary, &self.config.shim);
        Ok(process)
    }
}

fn start(id: &str, launch: Launch<'_>) -> Result<Process, VmmError> {
    let mut command = Command::new(launch.program);
    command.args(launch.args).env_clear().envs(launch.env).current_dir(launch.directory);
    if let Some(netns) = launch.netns {
        tap::start_inside(&mut command, netns);
    }
    let process = Process::spawn(command, launch.fds, &launch.log).map_err(|source| {
        VmmError::Process { vmm: VMM, id: id.to_owned(), source, log: String::new() }
    })?;
    if launch.background {
        priority::set(process.id().pid, Priority::Background);
    }
    Ok(process)
}

#[async_trait]
impl Driver for Qemu {
    fn kind(&self) -> VmmKind {
        VmmKind::Qemu
    }

    fn compat(&self) -> &Compat {
        &self.compat
    }

    async fn boot(&self, spec: &BootSpec) -> Result<Box<dyn Vm>, VmmError> {
        let cmdline = match self.config.accelerator {
            Accelerator::Kvm => spec.cmdline.clone(),
            Accelerator::Tcg => {
                format!("{} {TCG_CMDLINE} tsc_early_khz={}", spec.cmdline, host::tsc_khz())
            }
        };
        let machine = Machine {
            accelerator: self.config.accelerator,
            size: spec.size,
            memory: Memory::SharedFile(&spec.memory_file),
            root_disk: &spec.root_disk,
            scratch_disk: &spec.scratch_disk,
            nic: &spec.nic,
            console: Some(&spec.run_dir.join("console.log")),
            start: Start::Kernel(&spec.kernel, spec.initrd.as_deref(), &cmdline),
        };
        let process =
            self.spawn(&spec.id, &spec.run_dir, &machine, Vec::new(), Vec::new(), false)?;
        let record = VmRecord {
            id: spec.id.clone(),
            vmm: VmmKind::Qemu,
            process: process.id(),
            run_dir: spec.run_dir.clone(),
            backend: MemoryBackend::File,
            size: spec.size,
            details: Default::default(),
        };
        let qmp = connect(&record, &process).await?;
        Ok(Box::new(vm::QemuVm::new(record, process, qmp, vm::GuestMemory::OnFile, None)))
    }

    async fn prepare(&self, spec: &RestoreSpec) -> Result<Box<dyn Shell>, VmmError> {
        Ok(Box::new(shell::prepare(self, spec).await?))
    }

    async fn adopt(&self, record: &VmRecord) -> Result<Box<dyn Vm>, VmmError> {
        let process = Process::adopt(record.process).map_err(|source| VmmError::Process {
            vmm: VMM,
            id: record.id.clone(),
            source,
            log: String::new(),
        })?;
        let qmp = match connect(record, &process).await {
            Ok(qmp) => qmp,
            Err(e) => {
                // Not ours to kill on a failed look: the caller decides.
                process.release();
                return Err(e);
            }
        };
        let memory = vm::GuestMemory::reopen(record)?;
        let pager = (record.backend == MemoryBackend::Uffd).then(|| Arc::clone(&self.pager));
        Ok(Box::new(vm::QemuVm::new(record.clone(), process, qmp, memory, pager)))
    }
}

async fn version(binary: &Path) -> Result<String, VmmError> {
    let err = |source| VmmError::File { what: "cannot run", path: binary.to_owned(), source };
    let run = tokio::process::Command::new(binary).arg("--version").kill_on_drop(true).output();
    let output = tokio::time::timeout(START_DEADLINE, run)
        .await
        .map_err(|_| err(std::io::ErrorKind::TimedOut.into()))?
        .map_err(err)?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

fn log_path(run_dir: &Path) -> PathBuf {
    run_dir.join("vmm.log")
}

/// The last lines of the VMM's log, ready to be appended to an error.
fn log_tail(run_dir: &Path) -> String {
    let text = std::fs::read(log_path(run_dir)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().rev().filter(|l| !l.trim().is_empty()).take(4).collect();
    if lines.is_empty() {
        return String::new();
    }
    let lines: Vec<&str> = lines.into_iter().rev().collect();
    format!("; its log ends with: {}", lines.join(" | "))
}

fn listen(path: &Path) -> Result<UnixListener, VmmError> {
    UnixListener::bind(path).map_err(|source| VmmError::File {
        what: "cannot listen on",
        path: path.to_owned(),
        source,
    })
}

/// Connects to the control socket, or says how the process ended instead.
async fn connect(record: &VmRecord, process: &Process) -> Result<Qmp, VmmError> {
    let path = record.run_dir.join("qmp.sock");
    tokio::select! {
        biased;
        qmp = Qmp::connect(&path, START_DEADLINE) => qmp.map_err(|e| from_qmp(record, e)),
        reason = process.exited() => Err(died(record, reason)),
    }
}

fn died(record: &VmRecord, reason: crate::process::ExitReason) -> VmmError {
    VmmError::Process {
        vmm: VMM,
        id: record.id.clone(),
        source: crate::process::ProcessError::Died(reason),
        log: log_tail(&record.run_dir),
    }
}

fn from_qmp(record: &VmRecord, error: QmpError) -> VmmError {
    let id = record.id.clone();
    match error {
        QmpError::Refused { command, message } => {
            VmmError::Refused { vmm: VMM, id, command, message }
        }
        QmpError::Timeout { after, .. } => VmmError::Timeout {
            vmm: VMM,
            id,
            step: "a control command",
            after,
            log: log_tail(&record.run_dir),
        },
        QmpError::Io(source) => VmmError::Control { vmm: VMM, id, source },
    }
}
