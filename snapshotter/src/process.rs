//! Child processes that have an owner: found by pidfd and start time, killed when dropped, and able
//! to outlive the service on purpose.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

/// Names one process for ever: pids are used again, a pid with its start time is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot, field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
}

/// How a process ended, as far as it can be known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// Exit code.
    Code(i32),
    /// Killed by a signal.
    Signal(i32),
    /// It was not our child: only that it is gone is known.
    Unknown,
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(c) => write!(f, "exited with code {c}"),
            Self::Signal(s) => write!(f, "was killed by signal {s}"),
            Self::Unknown => f.write_str("is gone"),
        }
    }
}

/// Why a process could not be started, found or awaited.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It did not start.
    #[error("cannot start {program:?}: {source}")]
    Spawn {
        /// The program.
        program: String,
        /// What happened.
        source: io::Error,
    },
    /// It ended when it should not have.
    #[error("it {0}")]
    Died(ExitReason),
    /// There is no such process any more.
    #[error("pid {pid} with start time {start_time} is not running")]
    NotRunning {
        /// Process id.
        pid: i32,
        /// Start time.
        start_time: u64,
    },
    /// A system call on it failed.
    #[error("pidfd of {pid}: {source}")]
    Pidfd {
        /// Process id.
        pid: i32,
        /// What happened.
        source: io::Error,
    },
}

/// A process this service owns. Dropping it kills it, unless it was released.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
    is_child: bool,
    released: AtomicBool,
}

impl Process {
    /// Starts `program` with exactly the descriptors named in `fds` as `(descriptor, number in the
    /// child)`, in a process group of its own so that a signal to the service's terminal misses it.
    pub fn spawn(
        mut command: std::process::Command,
        fds: Vec<(OwnedFd, i32)>,
        log: &Path,
    ) -> Result<Self, ProcessError> {
        let mappings = fds
            .into_iter()
            .map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd })
            .collect();
        let program = command.get_program().to_string_lossy().into_owned();
        command
            .fd_mappings(mappings)
            .map_err(|e| ProcessError::Spawn { program, source: io::Error::other(e.to_string()) })?
            .stdin(std::process::Stdio::null());
        Self::spawn_as_it_is(command, log)
    }

    /// The same without other descriptors than the standard ones, the first as `command` has it.
    pub fn spawn_as_it_is(
        mut command: std::process::Command,
        log: &Path,
    ) -> Result<Self, ProcessError> {
        let program = command.get_program().to_string_lossy().into_owned();
        let spawn_err = |source| ProcessError::Spawn { program: program.clone(), source };
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log);
        let log = log.map_err(spawn_err)?;
        command.stderr(log.try_clone().map_err(spawn_err)?).stdout(log);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().map_err(spawn_err)?;
        let pid = child.id() as i32;
        // The child stays a zombie until it is reaped through its pidfd, so its pid cannot be
        // reused before the pidfd is open.
        Self::open(pid, true)
    }

    /// Takes hold of a process that an earlier service left running.
    pub fn adopt(id: ProcessId) -> Result<Self, ProcessError> {
        let mut process = Self::open(id.pid, false)?;
        // Compared after the pidfd is open: from here on the pid cannot change its meaning.
        if process.id != id {
            process.release();
            return Err(ProcessError::NotRunning { pid: id.pid, start_time: id.start_time });
        }
        // A service that replaced itself by `exec` still has its children, and must reap them.
        process.is_child = stat_field(id.pid, 1).is_ok_and(|p| p == u64::from(std::process::id()));
        Ok(process)
    }

    fn open(pid: i32, is_child: bool) -> Result<Self, ProcessError> {
        let err = |source| ProcessError::Pidfd { pid, source };
        let raw = Pid::from_raw(pid).ok_or_else(|| err(io::ErrorKind::InvalidInput.into()))?;
        let fd = pidfd_open(raw, PidfdFlags::NONBLOCK).map_err(|e| match e {
            rustix::io::Errno::SRCH => ProcessError::NotRunning { pid, start_time: 0 },
            e => err(e.into()),
        })?;
        let start_time = start_time(pid).map_err(err)?;
        // Deprecated for descriptors that could be closed behind its back; an OwnedFd cannot.
        #[allow(deprecated)]
        let pidfd = AsyncFd::with_interest(fd, tokio::io::Interest::READABLE).map_err(err)?;
        Ok(Self {
            id: ProcessId { pid, start_time },
            pidfd,
            is_child,
            released: AtomicBool::new(false),
        })
    }

    /// Its lasting name.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Dropping this no longer kills the process.
    pub fn release(&self) {
        self.released.store(true, Ordering::Relaxed);
    }

    /// Sends SIGKILL; a process that is already gone is fine.
    pub fn signal_kill(&self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }

    /// Sends SIGKILL and waits until the process is gone, for at most `deadline`.
    pub async fn kill(&self, deadline: Duration) -> Option<ExitReason> {
        self.signal_kill();
        tokio::time::timeout(deadline, self.exited()).await.ok()
    }

    /// Resolves when the process is gone.
    pub async fn exited(&self) -> ExitReason {
        loop {
            match self.pidfd.readable().await {
                Ok(mut guard) => {
                    if let Some(reason) = self.reap() {
                        // Left ready on purpose: every later caller returns at once.
                        guard.retain_ready();
                        return reason;
                    }
                    guard.clear_ready();
                }
                // The runtime is shutting down; there is nobody to tell.
                Err(_) => return ExitReason::Unknown,
            }
        }
    }

    fn reap(&self) -> Option<ExitReason> {
        if !self.is_child {
            return Some(ExitReason::Unknown);
        }
        let flags = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match waitid(WaitId::PidFd(std::os::fd::AsFd::as_fd(self.pidfd.get_ref())), flags) {
            Ok(Some(status)) => Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => ExitReason::Code(code),
                (None, Some(signal)) => ExitReason::Signal(signal),
                (None, None) => ExitReason::Unknown,
            }),
            Ok(None) => None,
            // Reaped by an earlier call.
            Err(_) => Some(ExitReason::Unknown),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.released.load(Ordering::Relaxed) {
            self.signal_kill();
            // SIGKILL is on its way, so this waits for the kernel's own work. What comes after, such
            // as the removal of the process's files, relies on it being gone. The descriptor is a
            // non-blocking one, and `waitid` alone would not wait.
            let mut gone = [PollFd::new(self.pidfd.get_ref(), PollFlags::IN)];
            let limit = Timespec { tv_sec: 5, tv_nsec: 0 };
            let _ = rustix::io::retry_on_intr(|| poll(&mut gone, Some(&limit)));
            let _ = self.reap();
        }
    }
}

/// Start time of `pid` in clock ticks since boot.
pub fn start_time(pid: i32) -> io::Result<u64> {
    stat_field(pid, 19)
}

/// A number out of `/proc/<pid>/stat`, counted from the field after the command name.
fn stat_field(pid: i32, index: usize) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command name is in parentheses and may hold anything, also parentheses.
    let after = stat.rfind(')').map_or("", |at| &stat[at + 1..]);
    after
        .split_ascii_whitespace()
        .nth(index)
        .and_then(|f| f.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat")))
}
