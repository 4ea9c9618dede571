//! Processes of this host, as `/proc` shows them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Policies of sched(7).
pub const SCHED_OTHER: i32 = 0;
pub const SCHED_RR: i32 = 2;

/// A process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub name: String,
    pub arguments: String,
    pub cwd: PathBuf,
}

impl Process {
    /// The process with this id, if it runs.
    pub fn read(pid: i32) -> Option<Self> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let stat = std::fs::read_to_string(dir.join("stat")).ok()?;
        // A zombie has ended; only its parent does not know yet.
        if stat.rsplit_once(") ")?.1.starts_with(['Z', 'X']) {
            return None;
        }
        let name = std::fs::read_to_string(dir.join("comm")).ok()?;
        let arguments = std::fs::read(dir.join("cmdline")).ok()?;
        Some(Self {
            pid,
            name: name.trim().to_owned(),
            arguments: String::from_utf8_lossy(&arguments).replace('\0', " "),
            cwd: std::fs::read_link(dir.join("cwd")).unwrap_or_default(),
        })
    }

    /// How its threads are scheduled (sched(7)), each policy once.
    pub fn policies(&self) -> BTreeSet<i32> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid)).unwrap().flatten();
        let stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
        // Field 41; the third is the first behind the name.
        let policy = |stat: String| {
            stat.rsplit_once(") ").unwrap().1.split(' ').nth(38).unwrap().parse().unwrap()
        };
        stats.map(policy).collect()
    }

    /// Ends it at once, as a crash would.
    pub fn kill(&self) {
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
    }

    pub fn is_there(&self) -> bool {
        Self::read(self.pid).is_some_and(|now| now.arguments == self.arguments)
    }

    /// Waits until it is gone.
    pub async fn gone(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.is_there() {
            assert!(Instant::now() < deadline, "{self:?} does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Every process that works in `dir` or was started with a path in it.
pub fn processes_of(dir: &Path) -> Vec<Process> {
    let wanted = format!("{}/", dir.display());
    let own = std::process::id().cast_signed();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        let Some(process) = Process::read(pid).filter(|p| p.pid != own) else { continue };
        let arguments = format!("{}/", process.arguments.trim_end().replace(' ', "/ "));
        if process.cwd.starts_with(dir) || arguments.contains(&wanted) {
            found.push(process);
        }
    }
    found
}
