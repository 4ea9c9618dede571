//! The journal daemon, which reads machine id and boot id once, when it starts, and writes them into
//! every entry. A clone's must have started after the clone's were in place.
//!
//! It runs in the workload's slice, so whoever freezes the workload stops it. It is killed then, or
//! at the identity where it was only frozen; systemd keeps the streams of all services for it and
//! starts the next one at once. That one is stopped on its way into the slice, before it executes a
//! single instruction of journald, and goes on with the thaw. So while the workload is frozen, a
//! process of the group is old if, and only if, it executes journald.
//!
//! A clone of a template lets it start a while after the thaw: starting is a tenth of a second of
//! work, and somebody may be waiting for the first command. What is logged meanwhile waits for it.

use super::proof::{Context, Item, ItemError, Reading};
use super::ready;
use crate::agent::Agent;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::thread::sleep;
use std::time::Duration;

const PROGRAM: &str = "/usr/lib/systemd/systemd-journald";
const GROUP: &str = "systemd-journald.service";
/// What systemd's own programs are called: a process that executes one is still to become journald.
const STARTERS: &[&str] = &["systemd", "systemd-executor"];
/// Where journals are, each in a folder named after a machine: in memory, and on the disk.
const VOLATILE: &str = "/run/log/journal";
const PERSISTENT: &str = "/var/log/journal";
/// Milliseconds. A killed process is gone when the kernel has taken its memory back.
const END_DEADLINE: u16 = 2000;
/// How often, and how far apart, the successor is looked for when a template is made.
const LOOKS: u32 = 200;
const LOOK: Duration = Duration::from_millis(5);
/// How long after its identity a clone lets journald start.
const DELAY: Duration = Duration::from_secs(3);

/// The item.
#[derive(Debug)]
pub struct Journald {
    waiting: Option<Rc<Waiting>>,
    /// The old processes last seen.
    seen: RefCell<Vec<i32>>,
}

impl Journald {
    /// The item.
    pub fn new(agent: &Agent) -> Self {
        Self { waiting: ready::journald(agent), seen: RefCell::default() }
    }

    /// The old processes there are.
    fn old(&self, agent: &Agent) -> io::Result<Vec<i32>> {
        // Nothing moved since: who waited then has executed nothing else.
        if let Some(waiting) = &self.waiting
            && waiting.are_all()
        {
            return Ok(Vec::new());
        }
        old(agent)
    }
}

/// The successors of a template's journald: stopped before they became it.
#[derive(Debug)]
pub struct Waiting {
    procs: File,
    /// What the file says: their numbers.
    list: Vec<u8>,
}

impl Waiting {
    fn look(agent: &Agent) -> io::Result<Self> {
        let procs = File::open(agent.workload.group(GROUP)?.join("cgroup.procs"))?;
        let mut list = vec![0; 256];
        let length = procs.read_at(&mut list, 0)?;
        list.truncate(length);
        if !old(agent)?.is_empty() {
            return Err(io::ErrorKind::Other.into());
        }
        Ok(Self { procs, list })
    }

    /// The group is still the same one, and has the same processes.
    fn are_all(&self) -> bool {
        let mut list = [0; 256];
        self.procs.read_at(&mut list, 0).is_ok_and(|length| list[..length] == self.list)
    }
}

/// Whether the template has a journal daemon.
fn in_template(agent: &Agent) -> bool {
    agent.path(PROGRAM).exists()
}

/// All processes of the group; none where there is no group.
fn processes(agent: &Agent) -> io::Result<Vec<i32>> {
    let group = agent.workload.group(GROUP)?;
    match fs::read_to_string(group.join("cgroup.procs")) {
        Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
        Err(error) if gone(&error) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The group, or the process, ended between two looks at it.
fn gone(error: &io::Error) -> bool {
    let raw = error.raw_os_error();
    error.kind() == io::ErrorKind::NotFound || raw == Some(libc::ENODEV) || raw == Some(libc::ESRCH)
}

/// Whether this process executes journald, and so may have read the ids.
fn is_old(pid: i32) -> io::Result<bool> {
    match fs::read_link(format!("/proc/{pid}/exe")) {
        Ok(program) => {
            let name = program.file_name().unwrap_or_default();
            Ok(!STARTERS.iter().any(|starter| name == *starter))
        }
        Err(error) if gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn old(agent: &Agent) -> io::Result<Vec<i32>> {
    let mut old = Vec::new();
    for pid in processes(agent)? {
        if is_old(pid)? {
            old.push(pid);
        }
    }
    Ok(old)
}

/// A journal daemon anywhere in the machine.
fn stray(agent: &Agent) -> Option<i32> {
    let program = agent.path(PROGRAM);
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|p| p == program))
}

/// Kills a process and waits for its end.
fn end(pid: i32) -> io::Result<()> {
    // SAFETY: the call takes no pointers and gives a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return if gone(&error) { Ok(()) } else { Err(error) };
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    match kill(Pid::from_raw(pid), Signal::SIGKILL) {
        Ok(()) => {}
        Err(nix::errno::Errno::ESRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::from(END_DEADLINE)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl Item for Journald {
    fn name(&self) -> &'static str {
        "journald"
    }

    fn not_applicable(&self, context: &Context<'_>) -> Option<String> {
        if !context.agent.workload.is_available() {
            return Some("no cgroup v2".to_owned());
        }
        let there = self.waiting.is_some() || in_template(context.agent);
        (!there).then(|| "the template has no journald".to_owned())
    }

    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError> {
        let old = self.old(context.agent).map_err(ItemError::io("look for journald"))?;
        let pids: Vec<String> = old.iter().map(i32::to_string).collect();
        *self.seen.borrow_mut() = old;
        Ok(Reading::of(pids.join(" ")))
    }

    fn apply(&mut self, _: &Context<'_>) -> Result<(), ItemError> {
        for &pid in self.seen.get_mut().iter() {
            end(pid).map_err(ItemError::io(format!("end journald ({pid})")))?;
        }
        Ok(())
    }

    fn check(&self, _: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        ItemError::compare("", &new.value)
    }
}

/// Ends the journal daemon of a machine that becomes a template, while the workload is frozen, and
/// removes its journals: those in memory, and with `all` those on the disk. What was removed is added
/// to `removed`.
///
/// # Errors
/// It runs where it is not frozen with the workload, or cannot be ended.
pub fn prepare(agent: &Agent, all: bool, removed: &mut Vec<String>) -> io::Result<()> {
    if !agent.workload.is_available() || !in_template(agent) {
        return Ok(());
    }
    let old = old(agent)?;
    for pid in &old {
        end(*pid)?;
    }
    // One that is not frozen with the workload would not be found in a clone.
    if let Some(pid) = stray(agent) {
        let text = format!("journald ({pid}) has to run in Slice=rethaw-workload.slice");
        return Err(io::Error::other(text));
    }
    let folders = [Some(VOLATILE), all.then_some(PERSISTENT)];
    for folder in folders.into_iter().flatten() {
        remove_all(&agent.path(folder), removed)?;
    }
    // systemd needs a moment to start the next one. In the template that is for nothing; a clone
    // would do it while its identity is waited for. Where it does not come, the clone does that.
    let mut looks = if old.is_empty() { 0 } else { LOOKS };
    while looks > 0 && processes(agent)?.is_empty() {
        looks -= 1;
        sleep(LOOK);
    }
    hold(agent, true)?;
    agent.ready.borrow_mut().journald = Waiting::look(agent).ok().map(Rc::new);
    Ok(())
}

/// Stops whoever is in the group, for longer than the workload, or no longer.
fn hold(agent: &Agent, hold: bool) -> io::Result<()> {
    let switch = agent.workload.group(GROUP)?.join("cgroup.freeze");
    match fs::write(switch, if hold { "1" } else { "0" }) {
        Err(error) if gone(&error) => Ok(()),
        done => done,
    }
}

/// Lets journald start now, in a machine that has its identity.
///
/// # Errors
/// The kernel refuses.
pub fn start(agent: &Agent) -> io::Result<()> {
    if agent.workload.is_available() { hold(agent, false) } else { Ok(()) }
}

/// The same in a while; an agent that is started anew meanwhile does it.
pub fn start_later(agent: &Rc<Agent>) {
    let agent = Rc::clone(agent);
    tokio::task::spawn_local(async move {
        tokio::time::sleep(DELAY).await;
        if let Err(error) = start(&agent) {
            eprintln!("rethaw-agent: journald cannot start: {error}");
        }
    });
}

fn remove_all(folder: &Path, removed: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry?.path();
        fs::remove_dir_all(&path)?;
        removed.push(path.to_string_lossy().into_owned());
    }
    Ok(())
}
