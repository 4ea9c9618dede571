//! The thread that listens to the page server, notices its death and has it replaced.

use std::io::PipeWriter;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::Signal;

use super::launch::{self, Running, StartError};
use super::link::{self, Link, Pending, RequestError};
use super::recovery::{self, Recovered};
use super::table::{Entry, Table};
use super::{PagerEvent, SupervisorConfig};
use crate::control::{Channel, Event, Registration, Reply, Request, VmSummary};
use crate::uffd::PAGE;
use crate::vm_state::VmState;
use crate::{fdpass, pidfd};

/// Pause between attempts to start a page server that does not start.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// What the supervisor's callers and its thread share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: SupervisorConfig,
    table: Mutex<Table>,
    current: Mutex<Current>,
    restarted: Condvar,
    subscribers: Mutex<Vec<Sender<PagerEvent>>>,
    /// Dropped to end the monitor.
    stop: Mutex<Option<PipeWriter>>,
    /// The page server was told to end and is not to be replaced.
    ending: AtomicBool,
}

#[derive(Debug, Default)]
struct Current {
    link: Option<Arc<Link>>,
    process: Option<Process>,
    /// Page servers that were replaced.
    generation: u64,
}

/// The page server's process, whoever started it.
#[derive(Debug)]
struct Process {
    pidfd: OwnedFd,
    child: Option<Child>,
}

/// What the monitor starts with.
pub(super) struct First {
    stop: std::io::PipeReader,
    events: Vec<Event>,
}

impl First {
    /// VMs that are lost already.
    pub(super) fn lost(&self) -> Vec<(String, String)> {
        self.events
            .iter()
            .filter_map(|event| match event {
                Event::VmLost { id, reason } => Some((id.clone(), reason.clone())),
                _ => None,
            })
            .collect()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Finds or starts a page server and takes back what it serves.
    pub(super) fn begin(config: SupervisorConfig) -> Result<(Self, First), StartError> {
        let mut table = Table::new(config.state_dir.clone());
        let (mut running, was_there) = launch::find_or_launch(&config)?;
        if was_there {
            adopt(&config, &mut running, &mut table)?;
        }
        recover(&config, &mut running, &mut table)?;
        let events = std::mem::take(&mut running.events);
        let current = Current::new(running)?;
        let (stop, stop_writer) =
            std::io::pipe().map_err(|source| StartError::Io { what: "pipe".into(), source })?;
        let shared = Self {
            config,
            table: Mutex::new(table),
            current: Mutex::new(current),
            restarted: Condvar::new(),
            subscribers: Mutex::default(),
            stop: Mutex::new(Some(stop_writer)),
            ending: AtomicBool::new(false),
        };
        Ok((shared, First { stop, events }))
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        locked(&self.table)
    }

    pub(super) fn generation(&self) -> u64 {
        locked(&self.current).generation
    }

    pub(super) fn pager_pid(&self) -> i32 {
        locked(&self.current).link.as_ref().map_or(0, |link| link.pager_pid)
    }

    /// Sends a request to the page server of the moment.
    pub(super) fn send(
        &self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Pending, RequestError> {
        let link = locked(&self.current).link.clone();
        link.ok_or(RequestError::Disconnected)?.send(request, fds)
    }

    /// Waits until the page server of that generation has been replaced.
    pub(super) fn wait_restart(&self, generation: u64, deadline: Instant) -> bool {
        let mut current = locked(&self.current);
        while current.generation <= generation || current.link.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.restarted.wait_timeout(current, left);
            current = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    pub(super) fn subscribe(&self, sender: Sender<PagerEvent>) {
        locked(&self.subscribers).push(sender);
    }

    fn publish(&self, event: &PagerEvent) {
        locked(&self.subscribers).retain(|sender| sender.send(event.clone()).is_ok());
    }

    pub(super) fn stop_monitor(&self) {
        locked(&self.stop).take();
    }

    /// The page server's end is wanted from now on.
    pub(super) fn expect_end(&self) {
        self.ending.store(true, Ordering::Release);
    }

    pub(super) fn kill_pager(&self) {
        if let Some(process) = &locked(&self.current).process {
            process.kill();
        }
    }

    /// Waits for the end of a page server that was told to end.
    pub(super) fn reap(&self, deadline: Instant) {
        let mut current = locked(&self.current);
        current.link = None;
        if let Some(process) = current.process.take() {
            process.end(deadline);
        }
    }

    /// Passes on what the page server reports.
    fn handle(&self, event: Event) {
        let event = match event {
            Event::VmGone { id } => {
                if !self.table().remove(&id) {
                    return;
                }
                PagerEvent::VmGone { id }
            }
            Event::VmLost { id, reason } => {
                self.table().set_lost(&id, &reason);
                PagerEvent::VmLost { id, reason }
            }
            Event::Graduated { id } => {
                if !self.table().set_graduated(&id) {
                    return;
                }
                PagerEvent::Graduated { id }
            }
        };
        self.publish(&event);
    }

    /// Starts a page server and hands it every VM.
    fn replace(&self) -> Result<(Vec<Event>, usize), StartError> {
        // One may be there: started by hand, or left by an attempt that ran out of time.
        let (mut running, _) = launch::find_or_launch(&self.config)?;
        let mut events = std::mem::take(&mut running.events);
        // Held until the new link is published: a VM is handed over here or sent there, not both.
        let mut table = self.table();
        let registrations: Vec<Registration> = table.served().cloned().collect();
        let mut lost = Vec::new();
        let count = registrations.len();
        for registration in registrations {
            let id = registration.id.clone();
            let deadline = Instant::now() + self.config.deadline;
            let request = Request::AddVm(registration);
            let fds = table.descriptors(&id);
            match link::ask(&running.channel, request, &fds, deadline, &mut events) {
                Ok((Reply::Failed { message }, _)) => lost.push((id, message)),
                Ok(_) => {}
                Err(error) => return Err(StartError::conversation(&self.config, &error)),
            }
        }
        for (id, reason) in lost {
            table.set_lost(&id, &reason);
            events.push(Event::VmLost { id, reason });
        }
        let new = Current::new(running)?;
        let mut current = locked(&self.current);
        let generation = current.generation + 1;
        *current = Current { generation, ..new };
        drop(current);
        self.restarted.notify_all();
        Ok((events, count))
    }
}

impl Current {
    fn new(running: Running) -> Result<Self, StartError> {
        let process = Process::new(running.pid, running.child)?;
        let link = Arc::new(Link::new(running.channel, running.pid));
        Ok(Self { link: Some(link), process: Some(process), generation: 0 })
    }
}

impl Process {
    fn new(pid: i32, child: Option<Child>) -> Result<Self, StartError> {
        let pidfd = pidfd::open(pid)
            .map_err(|source| StartError::Io { what: format!("pidfd of {pid}"), source })?;
        Ok(Self { pidfd, child })
    }

    fn kill(&self) {
        if let Err(error) = pidfd::send_signal(self.pidfd.as_fd(), Signal::SIGKILL) {
            tracing::debug!(%error, "killing the page server");
        }
    }

    /// Waits for its end, kills it at the deadline, and reaps it. Its lock is free afterwards.
    fn end(mut self, deadline: Instant) {
        if fdpass::wait_for(self.pidfd.as_fd(), PollFlags::POLLIN, deadline) != Ok(true) {
            self.kill();
            let soon = Instant::now() + Duration::from_secs(2);
            let _ = fdpass::wait_for(self.pidfd.as_fd(), PollFlags::POLLIN, soon);
        }
        if let Some(child) = &mut self.child {
            match child.try_wait() {
                Ok(status) => tracing::info!(?status, "page server ended"),
                Err(error) => tracing::warn!(%error, "reaping the page server"),
            }
        }
    }
}

/// Takes back the VMs of a page server that an earlier service started.
fn adopt(
    config: &SupervisorConfig,
    running: &mut Running,
    table: &mut Table,
) -> Result<(), StartError> {
    let wrong = |reason: String| StartError::conversation(config, &reason);
    let deadline = Instant::now() + config.deadline;
    let ask = |channel: &Channel, request, events: &mut Vec<Event>| {
        link::ask(channel, request, &[], deadline, events).map_err(|e| wrong(e.to_string()))
    };
    let (Reply::Vms { items }, _) = ask(&running.channel, Request::List, &mut running.events)?
    else {
        return Err(wrong("no list of VMs".into()));
    };
    for VmSummary { id, lost } in items {
        let request = Request::Describe { id: id.clone() };
        match ask(&running.channel, request, &mut running.events)? {
            (Reply::Vm(registration), fds) if fds.len() == registration.fd_count() => {
                let state = fds[2]
                    .try_clone()
                    .map_err(|source| StartError::Io { what: "dup".into(), source })?;
                let state = VmState::open(state, registration.memory_bytes / PAGE)
                    .map_err(|error| wrong(error.to_string()))?;
                if let Some(reason) = &lost {
                    running.events.push(Event::VmLost { id: id.clone(), reason: reason.clone() });
                }
                let graduated = state.is_graduated();
                table.insert(Entry { registration, fds, state: Arc::new(state), lost, graduated });
            }
            // It may have ended since it was listed.
            (Reply::Failed { message }, _) => tracing::info!(vm = id, message, "not adopted"),
            (reply, fds) => {
                return Err(wrong(format!("{reply:?} with {} descriptors", fds.len())));
            }
        }
    }
    tracing::info!(pid = running.pid, vms = table.ids().len(), "adopted a page server");
    Ok(())
}

/// Takes back the VMs that no page server knows, because it was killed with the service.
fn recover(
    config: &SupervisorConfig,
    running: &mut Running,
    table: &mut Table,
) -> Result<(), StartError> {
    let Some(dir) = &config.state_dir else { return Ok(()) };
    let io = |source| StartError::Io { what: dir.display().to_string(), source };
    std::fs::create_dir_all(dir).map_err(io)?;
    for recovered in recovery::recover_all(dir, &table.ids(), &*config.keys).map_err(io)? {
        match recovered {
            Recovered::Vm(entry) => {
                let id = entry.registration.id.clone();
                let request = Request::AddVm(entry.registration.clone());
                let deadline = Instant::now() + config.deadline;
                table.insert(*entry);
                let fds = table.descriptors(&id);
                let (channel, events) = (&running.channel, &mut running.events);
                match link::ask(channel, request, &fds, deadline, events) {
                    Ok((Reply::Failed { message: reason }, _)) => {
                        table.set_lost(&id, &reason);
                        events.push(Event::VmLost { id, reason });
                    }
                    Ok(_) => tracing::warn!(vm = id, "recovered"),
                    Err(error) => return Err(StartError::conversation(config, &error)),
                }
            }
            Recovered::Lost { id, reason } => {
                recovery::forget(dir, &id);
                running.events.push(Event::VmLost { id, reason });
            }
            Recovered::Gone(id) => {
                recovery::forget(dir, &id);
                tracing::info!(vm = id, "ended while nobody served it");
            }
        }
    }
    Ok(())
}

/// The monitor's thread.
pub(super) fn run(shared: &Shared, first: First) {
    let First { stop, events } = first;
    events.into_iter().for_each(|event| shared.handle(event));
    loop {
        let Some(link) = locked(&shared.current).link.clone() else { return };
        let heard = listen(shared, &link, stop.as_fd());
        if heard == Heard::Stop || shared.ending.load(Ordering::Acquire) {
            return;
        }
        let began = Instant::now();
        let process = {
            let mut current = locked(&shared.current);
            current.link = None;
            current.process.take()
        };
        link.close();
        if let Some(process) = process {
            process.kill();
            process.end(began + Duration::from_secs(2));
        }
        loop {
            match shared.replace() {
                Ok((events, vms)) => {
                    let millis = began.elapsed().as_millis() as u64;
                    let pid = shared.pager_pid();
                    tracing::warn!(pid, vms, millis, "page server replaced");
                    shared.publish(&PagerEvent::PagerRestarted { pid, vms, millis });
                    events.into_iter().for_each(|event| shared.handle(event));
                    break;
                }
                Err(error) => {
                    tracing::error!(%error, "no page server");
                    let reason = error.to_string();
                    shared.publish(&PagerEvent::PagerUnavailable { reason });
                    let pause = Instant::now() + RETRY_PAUSE;
                    if fdpass::wait_for(stop.as_fd(), PollFlags::POLLIN, pause) != Ok(false) {
                        return;
                    }
                }
            }
        }
    }
}

#[derive(PartialEq, Eq)]
enum Heard {
    Stop,
    Death,
}

/// Listens until the page server dies or keeps silent for too long.
fn listen(shared: &Shared, link: &Link, stop: BorrowedFd<'_>) -> Heard {
    let mut owed: Option<Pending> = None;
    let mut next_beat = Instant::now() + shared.config.heartbeat;
    loop {
        let left = next_beat.saturating_duration_since(Instant::now());
        let mut fds =
            [PollFd::new(link.as_fd(), PollFlags::POLLIN), PollFd::new(stop, PollFlags::POLLIN)];
        let _ = poll(&mut fds, fdpass::poll_timeout(left));
        let stopping = fds[1].any().unwrap_or(false);
        loop {
            match link.read() {
                Ok(Some(event)) => shared.handle(event),
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, pid = link.pager_pid, "page server lost");
                    return if stopping { Heard::Stop } else { Heard::Death };
                }
            }
        }
        if stopping {
            return Heard::Stop;
        }
        if Instant::now() >= next_beat {
            if let Some(owed) = owed.take()
                && matches!(owed.wait(Instant::now()), Err(RequestError::TimedOut))
            {
                tracing::error!(pid = link.pager_pid, "page server does not answer");
                return Heard::Death;
            }
            owed = link.send(Request::Ping, &[]).ok();
            next_beat = Instant::now() + shared.config.heartbeat;
        }
    }
}
