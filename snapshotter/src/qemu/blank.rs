//! QEMUs started ahead.
//!
//! Half of the time it takes QEMU to start is spent before its `main`: fifty libraries are loaded
//! and a quarter of a million addresses put right, the same ones for every VM. So one process is
//! always there that has this behind it; the preload shim has it wait to be told its arguments, its
//! descriptors and its network namespace (`uffd-handler/shim/src/blank.rs` has the message). It is
//! started anew for each VM: no two share the places of their code and data in memory, as two
//! children of one process would.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use uffd_handler::fdpass;

use crate::priority;
use crate::process::Process;
use crate::vmm::Priority;

/// Number of the socket in the process that waits. Any other would have to be set between `fork` and
/// `exec`. With this one the standard library needs no `fork`, after which every page of the service
/// would be copied when it is written to, mostly in the midst of claims.
const WAIT_FD: i32 = 0;
/// Place of a descriptor that is a network namespace to enter.
const ENTER: i32 = -1;
/// Tells a shim in QEMU which socket to wait at.
const WAIT: &str = "RETHAW_SHIM_WAIT";

/// What a QEMU is to be.
#[derive(Debug)]
pub(super) struct Launch<'a> {
    /// The program.
    pub(super) program: &'a Path,
    /// Its arguments.
    pub(super) args: Vec<String>,
    /// Its whole environment.
    pub(super) env: Vec<(&'static str, String)>,
    /// Its working directory.
    pub(super) directory: &'a Path,
    /// Descriptors and their numbers in it.
    pub(super) fds: Vec<(OwnedFd, i32)>,
    /// The network namespace it runs in, if not the service's.
    pub(super) netns: Option<OwnedFd>,
    /// Its output is added to this file.
    pub(super) log: PathBuf,
    /// Nobody waits for it.
    pub(super) background: bool,
}

/// The one that waits.
#[derive(Debug, Default)]
pub(super) struct Blanks(Mutex<Slot>);

#[derive(Debug, Default)]
enum Slot {
    #[default]
    Empty,
    Starting,
    Waits(Blank),
}

#[derive(Debug)]
struct Blank {
    process: Process,
    socket: OwnedFd,
}

impl Blanks {
    /// Makes the one that waits what `launch` says; `None` if there is none, or it does not listen.
    pub(super) fn launch(&self, launch: &Launch<'_>) -> Option<Process> {
        let blank = {
            let mut slot = self.lock();
            match std::mem::take(&mut *slot) {
                Slot::Waits(blank) => blank,
                other => {
                    *slot = other;
                    return None;
                }
            }
        };
        match blank.become_(launch) {
            Ok(process) => Some(process),
            Err(e) => {
                tracing::debug!("the QEMU started ahead is of no use: {e}");
                None
            }
        }
    }

    /// Starts one that waits, if none does, on a thread that may block. It gets what CPU time is
    /// left over.
    pub(super) fn refill(self: &Arc<Self>, binary: &Path, shim: &Path) {
        let (blanks, binary, shim) = (Arc::clone(self), binary.to_owned(), shim.to_owned());
        tokio::task::spawn_blocking(move || {
            {
                let mut slot = blanks.lock();
                if !matches!(*slot, Slot::Empty) {
                    return;
                }
                *slot = Slot::Starting;
            }
            // Not under the lock: it takes as long as others leave it no time.
            let started = Blank::start(&binary, &shim);
            *blanks.lock() = match started {
                Ok(blank) => Slot::Waits(blank),
                Err(e) => {
                    tracing::debug!("no QEMU started ahead: {e}");
                    Slot::Empty
                }
            };
        });
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Blank {
    fn start(binary: &Path, shim: &Path) -> std::io::Result<Self> {
        let (here, there) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let mut command = Command::new(binary);
        // Where the shim has no effect, it says its version and ends.
        command.arg("--version").env_clear();
        command.env("LD_PRELOAD", shim).env(WAIT, WAIT_FD.to_string()).stdin(there);
        let log = Path::new("/dev/null");
        let process = Process::spawn_as_it_is(command, log).map_err(std::io::Error::other)?;
        priority::set(process.id().pid, Priority::Background);
        Ok(Self { process, socket: here })
    }

    fn become_(self, launch: &Launch<'_>) -> std::io::Result<Process> {
        let log = File::options().create(true).append(true).open(&launch.log)?;
        let nothing = File::open("/dev/null")?;
        let mut fds: Vec<(BorrowedFd<'_>, i32)> =
            vec![(nothing.as_fd(), 0), (log.as_fd(), 1), (log.as_fd(), 2)];
        fds.extend(launch.fds.iter().map(|(fd, number)| (fd.as_fd(), *number)));
        fds.extend(launch.netns.iter().map(|netns| (netns.as_fd(), ENTER)));
        let message = launch.message(fds.iter().map(|(_, number)| *number));
        let descriptors: Vec<BorrowedFd<'_>> = fds.iter().map(|(fd, _)| *fd).collect();
        fdpass::send(self.socket.as_fd(), &message, &descriptors)?;
        if !launch.background {
            priority::set(self.process.id().pid, Priority::Normal);
        }
        Ok(self.process)
    }
}

impl Launch<'_> {
    fn message(&self, places: impl Iterator<Item = i32>) -> Vec<u8> {
        let mut message = (self.args.len() as u32 + 1).to_ne_bytes().to_vec();
        message.extend((self.env.len() as u32).to_ne_bytes());
        places.for_each(|place| message.extend(place.to_ne_bytes()));
        let variables: Vec<String> = self.env.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let paths = [self.directory, self.program].map(|path| path.as_os_str().as_bytes());
        let texts = self.args.iter().chain(&variables).map(String::as_bytes);
        for text in paths.into_iter().chain(texts) {
            message.extend_from_slice(text);
            message.push(0);
        }
        message
    }
}
