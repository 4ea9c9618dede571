//! The workload's cgroup: everything a user runs is in it, so that one write stops all of it
//! before a snapshot and one write lets it go on.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Group that is frozen and thawed. It is where systemd has a slice of this name, so that services
/// can be put into it, too: a dash in the name is a level of the tree.
const SLICE: &str = "rethaw.slice/rethaw-workload.slice";
/// Group in it that the agent's commands are started in.
const COMMANDS: &str = "rethaw-exec";
/// Freezing waits for every process to stop; uninterruptible ones can take a moment.
const FREEZE_DEADLINE: Duration = Duration::from_secs(5);

/// What a `cgroup.events` file says now.
fn says_frozen(events: &File) -> io::Result<bool> {
    let mut text = [0; 64];
    let n = events.read_at(&mut text, 0)?;
    Ok(text[..n].split(|b| *b == b'\n').any(|line| line == b"frozen 1"))
}

/// The workload's cgroup, or the lack of one.
#[derive(Debug)]
pub struct Workload {
    mount: Option<PathBuf>,
    /// Left open by who froze it: thawing it has no time for opening files.
    switch: RefCell<Option<Rc<Switch>>>,
}

/// The files that stop and start it, and say whether it is stopped.
#[derive(Debug)]
struct Switch {
    freeze: File,
    events: File,
}

impl Switch {
    fn turn(&self, freeze: bool) -> io::Result<()> {
        self.freeze.write_all_at(if freeze { b"1" } else { b"0" }, 0)
    }
}

impl Workload {
    /// The workload under a cgroup v2 mount.
    pub fn new(mount: Option<PathBuf>) -> Self {
        Self { mount, switch: RefCell::default() }
    }

    /// Whether there is a cgroup v2 to use.
    pub fn is_available(&self) -> bool {
        self.mount.is_some()
    }

    fn slice(&self) -> io::Result<PathBuf> {
        self.mount
            .as_ref()
            .map(|m| m.join(SLICE))
            .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "no cgroup v2"))
    }

    /// Directory of a group in the workload's.
    ///
    /// # Errors
    /// No cgroup v2.
    pub fn group(&self, name: &str) -> io::Result<PathBuf> {
        Ok(self.slice()?.join(name))
    }

    /// Directory to start a command in; `None` without cgroup v2.
    ///
    /// # Errors
    /// The group cannot be made or opened.
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        if self.mount.is_none() {
            return Ok(None);
        }
        let group = self.slice()?.join(COMMANDS);
        match File::open(&group) {
            Ok(dir) => Ok(Some(dir.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&group)?;
                Ok(Some(File::open(&group)?.into()))
            }
            Err(error) => Err(error),
        }
    }

    /// Stops every process of the workload and waits until the kernel says that all have.
    ///
    /// # Errors
    /// No cgroup v2, or not all stopped in time.
    pub fn freeze(&self) -> io::Result<()> {
        let slice = self.slice()?;
        fs::create_dir_all(slice.join(COMMANDS))?;
        let switch = Rc::new(self.open_switch()?);
        *self.switch.borrow_mut() = Some(Rc::clone(&switch));
        switch.turn(true)?;
        wait(&switch.events, true)
    }

    /// Lets the workload run; the caller reads [`Workload::is_frozen`] afterwards.
    ///
    /// # Errors
    /// The write failed.
    pub fn thaw(&self) -> io::Result<()> {
        self.switch()?.turn(false)
    }

    /// What the kernel says: whether all processes of the workload are stopped.
    ///
    /// # Errors
    /// The state cannot be read.
    pub fn is_frozen(&self) -> io::Result<bool> {
        says_frozen(&self.switch()?.events)
    }

    fn switch(&self) -> io::Result<Rc<Switch>> {
        let known = self.switch.borrow().clone();
        known.map_or_else(|| self.open_switch().map(Rc::new), Ok)
    }

    fn open_switch(&self) -> io::Result<Switch> {
        let slice = self.slice()?;
        let freeze = OpenOptions::new().write(true).open(slice.join("cgroup.freeze"))?;
        Ok(Switch { freeze, events: File::open(slice.join("cgroup.events"))? })
    }

    /// Number of processes in the workload.
    pub fn processes(&self) -> u32 {
        fn count(dir: &std::path::Path) -> u32 {
            let own = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            let below = fs::read_dir(dir).into_iter().flatten().flatten();
            let below = below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
            own.lines().count() as u32 + below.map(|e| count(&e.path())).sum::<u32>()
        }
        self.slice().map_or(0, |slice| count(&slice))
    }
}

fn wait(events: &File, frozen: bool) -> io::Result<()> {
    let until = Instant::now() + FREEZE_DEADLINE;
    // Read and polled over one descriptor: a change is news until it was read there. This thread
    // goes before all others, so a poll that never waits would keep from running just those that
    // have to run to stop.
    while says_frozen(events)? != frozen {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let text = format!("the workload did not stop within {FREEZE_DEADLINE:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        // The kernel reports each change of the file as priority data.
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
