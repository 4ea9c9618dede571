//! What a service has changed on its host, noted before it is done, in a file that does not outlive
//! the machine. All services' notes are in one folder: whoever comes later finds there what is to be
//! kept, undone, or shared, and takes its lock before it changes any of it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use snapshotter::process::{ProcessId, start_time};

use super::nft::{self, Batch};
use super::slot::sysctl;

/// End of the names of notes, all of one directory.
pub const NOTE: &str = ".network.json";
/// That directory: gone with the machine, as what is noted is.
pub const NOTES: &str = "/run/rethaw";
const LOCK: &str = "network.lock";
/// Whoever has the lock needs some milliseconds.
const LOCK_DEADLINE: Duration = Duration::from_secs(20);
const LOCK_STEP: Duration = Duration::from_millis(10);

/// A service's process, as far as it can be told apart from all others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    /// The process.
    process: ProcessId,
    /// The namespace that its number is of.
    pid_namespace: u64,
}

impl Owner {
    fn this() -> io::Result<Self> {
        let pid = std::process::id().cast_signed();
        let process = ProcessId { pid, start_time: start_time(pid)? };
        Ok(Self { process, pid_namespace: fs::metadata("/proc/self/ns/pid")?.ino() })
    }

    /// It is certain that the process is no more.
    pub fn is_dead(&self) -> bool {
        let here = fs::metadata("/proc/self/ns/pid").is_ok_and(|m| m.ino() == self.pid_namespace);
        here && match start_time(self.process.pid) {
            Ok(now) => now != self.process.start_time,
            Err(e) => e.kind() == io::ErrorKind::NotFound,
        }
    }
}

/// What is noted.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// The service's data directory.
    #[serde(default)]
    pub home: PathBuf,
    /// The service that wrote this; it alone may undo it while it runs.
    #[serde(default)]
    pub owner: Option<Owner>,
    /// The network namespace that the changes are in.
    #[serde(default)]
    pub namespace: u64,
    /// The table's name.
    #[serde(default)]
    pub table: String,
    /// The slots' network: VMs that outlive the service have addresses in it.
    pub network: Option<Ipv4Addr>,
    /// Whether slots have IPv6.
    pub v6: bool,
    /// Switches below `/proc/sys/net` that were 0 and are 1 now.
    pub switches: BTreeSet<String>,
}

impl Note {
    /// Reads a note; none is an empty one.
    pub fn read(path: &Path) -> io::Result<Self> {
        match fs::read(path) {
            Ok(text) => Ok(serde_json::from_slice(&text)?),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(e),
        }
    }

    /// Makes the note this process's, and writes it.
    pub fn write(&mut self, path: &Path) -> io::Result<()> {
        self.owner = Some(Owner::this()?);
        let draft = path.with_extension("draft");
        let mut file = File::create(&draft)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    }

    /// Undoes what is noted in `path`, and forgets it.
    ///
    /// # Errors
    /// What cannot be undone; it stays noted.
    pub fn undo(&self, path: &Path) -> io::Result<()> {
        let mut netlink = nft::open()?;
        let mut done = Batch::new(&self.table).table().delete_table().commit(&mut netlink);
        let others = others(path);
        let needed = |switch: &String| others.iter().any(|other| other.switches.contains(switch));
        for switch in self.switches.iter().filter(|switch| !needed(switch)) {
            match sysctl(switch, "0") {
                Err(e) if e.kind() != io::ErrorKind::NotFound => done = Err(e),
                _ => {}
            }
        }
        done?;
        fs::remove_file(path)
    }
}

/// All notes of a folder but `own`, with their files.
pub(super) fn all(folder: &Path, own: &Path) -> Vec<(PathBuf, Note)> {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files
        .map(|entry| entry.path())
        .filter(|path| path != own && path.to_string_lossy().ends_with(NOTE))
        .filter_map(|path| Note::read(&path).ok().map(|note| (path, note)))
        .collect()
}

/// What other services in this network namespace have noted: those whose tables are here.
pub(super) fn others(own: &Path) -> Vec<Note> {
    let (Ok(mut netlink), Some(folder)) = (nft::open(), own.parent()) else { return Vec::new() };
    let mut is_here = |note: &Note| {
        namespace().is_ok_and(|here| here == note.namespace)
            && nft::has_table(&mut netlink, &note.table).unwrap_or(true)
    };
    all(folder, own).into_iter().map(|(_, note)| note).filter(|note| is_here(note)).collect()
}

/// The number of this thread's network namespace.
pub(super) fn namespace() -> io::Result<u64> {
    Ok(fs::metadata("/proc/thread-self/ns/net")?.ino())
}

/// Nobody else changes what is noted in this folder as long as the file is open. The folder is made.
///
/// # Errors
/// It cannot be made, or another holds the lock and does not let go.
pub(super) fn lock(folder: &Path) -> io::Result<File> {
    fs::create_dir_all(folder)?;
    let path = folder.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    let until = Instant::now() + LOCK_DEADLINE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(LOCK_STEP);
            }
            Err(e) => {
                let text = format!("{} is held by another: {e}", path.display());
                return Err(io::Error::new(io::Error::from(e).kind(), text));
            }
        }
    }
}
