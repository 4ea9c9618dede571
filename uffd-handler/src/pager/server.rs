//! The main thread of the page server: its socket, its clients and its table of VMs.

use std::collections::HashMap;
use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{SockFlag, accept4};
use thiserror::Error;

use super::layer_cache::LayerCache;
use super::session::End;
use super::spin::SpinPolicy;
use super::vm::{Report, Vm, What};
use crate::control::{
    self, Channel, ChannelError, Event, FromPager, PROTOCOL_VERSION, Registration, Reply, Request,
    ToPager, VmSummary,
};
use crate::fdpass;

/// Connections at one time; a service needs one.
const MAX_CLIENTS: usize = 8;

/// How a page server is run.
#[derive(Clone, Debug)]
pub struct PagerConfig {
    /// Where it listens.
    pub socket: PathBuf,
    /// How long it stays without a VM and without a service.
    pub idle_exit: Duration,
    /// How it waits for the next fault.
    pub spin: SpinPolicy,
}

/// Why a page server ended that should not have.
#[derive(Debug, Error)]
pub enum PagerError {
    /// Another one serves this socket.
    #[error("another page server holds {0}")]
    InUse(PathBuf),
    /// The control channel cannot be set up.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The lock file or a pipe failed.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
}

/// Runs a page server until it has been idle for long enough or is told to end. Calls `ready` once
/// connections are accepted.
pub fn run(config: &PagerConfig, ready: impl FnOnce()) -> Result<(), PagerError> {
    let _lock = lock(&config.socket)?;
    raise_fd_limit();
    let listener = control::listen(&config.socket)?;
    let io = |what: &str| {
        let what = what.to_string();
        move |source| PagerError::Io { what, source }
    };
    let (wake, wake_writer) = std::io::pipe().map_err(io("pipe"))?;
    let (reports, inbox) = channel();
    let (relay, relay_inbox) = channel::<Report>();
    // Reports come through a channel; a byte in the pipe makes poll see them.
    std::thread::Builder::new()
        .name("reports".into())
        .spawn(move || relay_reports(&relay_inbox, &reports, wake_writer))
        .map_err(io("thread"))?;
    let server = Server {
        listener,
        clients: Vec::new(),
        vms: HashMap::new(),
        cache: LayerCache::default(),
        relay,
        next_serial: 0,
        spin: config.spin,
    };
    ready();
    server.serve(&wake, &inbox, config.idle_exit);
    Ok(())
}

fn relay_reports(from: &Receiver<Report>, to: &Sender<Report>, mut wake: std::io::PipeWriter) {
    use std::io::Write;
    for report in from {
        if to.send(report).is_err() || wake.write_all(&[0]).is_err() {
            return;
        }
    }
}

/// Makes sure that this is the only page server on the socket.
fn lock(socket: &Path) -> Result<Flock<File>, PagerError> {
    let path = socket.with_extension("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|source| PagerError::Io { what: path.display().to_string(), source })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => PagerError::InUse(path),
        errno => PagerError::Io { what: path.display().to_string(), source: errno.into() },
    })
}

/// Each VM takes about eight descriptors.
fn raise_fd_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(errno) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%errno, soft, hard, "descriptor limit stays as it is");
    }
}

struct Server {
    listener: OwnedFd,
    clients: Vec<Channel>,
    vms: HashMap<String, Vm>,
    cache: LayerCache,
    relay: Sender<Report>,
    next_serial: u64,
    spin: SpinPolicy,
}

impl Server {
    fn serve(mut self, wake: &PipeReader, inbox: &Receiver<Report>, idle_exit: Duration) {
        let mut idle_since = Some(Instant::now());
        loop {
            let idle = self.clients.is_empty() && self.vms.is_empty();
            idle_since = idle.then(|| idle_since.unwrap_or_else(Instant::now));
            let left = idle_since.map(|since| idle_exit.saturating_sub(since.elapsed()));
            if left == Some(Duration::ZERO) {
                tracing::info!("no VMs and no service, ending");
                return;
            }
            let mut fds = vec![
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(wake.as_fd(), PollFlags::POLLIN),
            ];
            let clients = self.clients.iter();
            fds.extend(clients.map(|client| PollFd::new(client.as_fd(), PollFlags::POLLIN)));
            let timeout = left.map_or(PollTimeout::NONE, fdpass::poll_timeout);
            if let Err(errno) = poll(&mut fds, timeout) {
                tracing::debug!(%errno, "poll");
                continue;
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            drop(fds);
            // Clients first, from the last: what follows may remove any of them.
            for i in (0..ready.len() - 2).rev() {
                if ready[i + 2] && !self.client(i) {
                    return;
                }
            }
            if ready[1] {
                // Its contents mean nothing: one byte, one report, and extra ones do no harm.
                let mut byte = [0; 1];
                let _ = (&mut &*wake).read(&mut byte);
                inbox.try_iter().for_each(|report| self.report(report));
            }
            if ready[0] {
                self.accept();
            }
        }
    }

    fn accept(&mut self) {
        match accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(fd) if self.clients.len() < MAX_CLIENTS => {
                // SAFETY: accept4 has just made this descriptor for us.
                self.clients.push(Channel::new(unsafe { OwnedFd::from_raw_fd(fd) }));
            }
            Ok(fd) => {
                // SAFETY: as above; dropping it refuses the connection.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
                tracing::warn!("connection refused: there are {MAX_CLIENTS} already");
            }
            Err(errno) => tracing::warn!(%errno, "accept"),
        }
    }

    /// Handles what one client sent; false when the process is to end.
    fn client(&mut self, index: usize) -> bool {
        loop {
            let packet = match self.clients[index].try_receive::<ToPager>() {
                Ok(Some(packet)) => packet,
                Ok(None) => return true,
                Err(error) => {
                    tracing::info!(%error, "service disconnected");
                    self.clients.swap_remove(index);
                    return true;
                }
            };
            let (ToPager { number, request }, fds) = packet;
            let shutdown = request == Request::Shutdown;
            let (reply, with) = self.request(request, fds);
            let with: Vec<_> = with
                .and_then(|id| self.vms.get(&id))
                .map_or(Vec::new(), |vm| vm.fds.iter().map(AsFd::as_fd).collect());
            let sent = self.clients[index].send(&FromPager::Reply { number, reply }, &with);
            if let Err(error) = sent {
                tracing::warn!(%error, "service does not take its reply");
                self.clients.swap_remove(index);
                return true;
            }
            if shutdown {
                tracing::info!("told to end");
                return false;
            }
        }
    }

    /// Does what is asked; names the VM whose descriptors go with the reply.
    fn request(&mut self, request: Request, fds: Vec<OwnedFd>) -> (Reply, Option<String>) {
        let failed = |message: String| (Reply::Failed { message }, None);
        match request {
            Request::Hello { version } => {
                if version != PROTOCOL_VERSION {
                    tracing::warn!(version, ours = PROTOCOL_VERSION, "service of another version");
                }
                let pid = std::process::id() as i32;
                (Reply::Hello { version: PROTOCOL_VERSION, pid }, None)
            }
            Request::Ping | Request::Shutdown => (Reply::Done, None),
            Request::AddVm(registration) => match self.add(registration, fds) {
                Ok(()) => (Reply::Done, None),
                Err(message) => failed(message),
            },
            Request::RemoveVm { id, request } => match self.vms.remove(&id) {
                Some(_) => {
                    tracing::info!(vm = id, request, "not served any more");
                    (Reply::Done, None)
                }
                None => failed(format!("no VM {id}")),
            },
            Request::Claim { id, request } => match self.vms.get_mut(&id) {
                Some(vm) => {
                    tracing::info!(vm = id, request, "claimed");
                    vm.registration.request = Some(request);
                    (Reply::Done, None)
                }
                None => failed(format!("no VM {id}")),
            },
            Request::Graduate { id } => match self.vms.get_mut(&id).map(Vm::graduate) {
                Some(Ok(())) => (Reply::Done, None),
                Some(Err(error)) => failed(format!("thread: {error}")),
                None => failed(format!("no VM {id}")),
            },
            Request::List => {
                let vms = self.vms.values();
                let items = vms
                    .map(|vm| VmSummary { id: vm.registration.id.clone(), lost: vm.lost.clone() })
                    .collect();
                (Reply::Vms { items }, None)
            }
            Request::Describe { id } => match self.vms.get(&id) {
                Some(vm) => (Reply::Vm(vm.registration.clone()), Some(id)),
                None => failed(format!("no VM {id}")),
            },
        }
    }

    fn add(&mut self, registration: Registration, fds: Vec<OwnedFd>) -> Result<(), String> {
        let id = registration.id.clone();
        if self.vms.contains_key(&id) {
            return Err(format!("VM {id} is here already"));
        }
        self.next_serial += 1;
        let serial = self.next_serial;
        let vm = Vm::take(registration, fds, serial, &mut self.cache, &self.relay, self.spin)
            .map_err(|error| error.to_string())?;
        self.vms.insert(id, vm);
        Ok(())
    }

    /// A thread of a VM has something to say.
    fn report(&mut self, report: Report) {
        let Report { id, serial, what } = report;
        let Some(vm) = self.vms.get_mut(&id).filter(|vm| vm.serial == serial) else { return };
        let event = match what {
            What::End(End::Stopped) => return,
            What::End(End::Gone) => {
                tracing::info!(vm = id, request = vm.registration.request, "ended");
                self.vms.remove(&id);
                Event::VmGone { id }
            }
            What::End(End::Lost(reason)) => {
                tracing::error!(vm = id, request = vm.registration.request, reason, "VM lost");
                vm.lost = Some(reason.clone());
                Event::VmLost { id, reason }
            }
            What::Graduated => Event::Graduated { id },
        };
        let message = FromPager::Event(event);
        self.clients.retain(|client| match client.send(&message, &[]) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "service does not take its events");
                false
            }
        });
    }
}
