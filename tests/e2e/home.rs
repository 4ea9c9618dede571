//! Homes: a data directory for one test, with the guest image and the golden snapshot of all.
//!
//! ```text
//! $RETHAW_HOME/images, kernels  guest images       <- symlinks ---+
//! $RETHAW_HOME/t/snapshots      golden snapshots   <- hard links -+
//! $RETHAW_HOME/t/<pid>-<n>      home of one test -----------------+
//! ```
//!
//! The first test to come makes what is not there yet (minutes) and shares it; what a test run
//! that was killed left behind is removed then, too. Paths are short: sockets must fit.
//! `$RETHAW_HOME` itself may be in use: nothing but images and kernels, which have locks of their
//! own, is written there.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;
use tokio::sync::{OnceCell, Semaphore, SemaphorePermit};

use crate::process::{Process, processes_of};
use crate::service::Service;

/// Services at a time.
static SLOTS: Semaphore = Semaphore::const_new(2);
static WARM: OnceCell<()> = OnceCell::const_new();
static COUNT: AtomicU32 = AtomicU32::new(0);

/// Making the guest image and booting it takes minutes where there is no cache.
const BAKE_DEADLINE: Duration = Duration::from_secs(25 * 60);

/// A test's data directory; removed with every process in it when dropped.
#[derive(Debug)]
pub struct Home {
    path: PathBuf,
    _slot: SemaphorePermit<'static>,
}

/// Where images and snapshots are kept.
pub fn cache() -> PathBuf {
    let set = std::env::var_os("RETHAW_HOME").filter(|home| !home.is_empty());
    set.map_or_else(|| PathBuf::from("/var/lib/rethaw"), PathBuf::from)
}

impl Home {
    /// A new home, once it is this test's turn.
    pub async fn new() -> Self {
        let slot = SLOTS.acquire().await.unwrap();
        // In a box: it starts a service, which needs a home.
        Box::pin(WARM.get_or_init(warm_up)).await;
        Self::make(slot)
    }

    fn make(slot: SemaphorePermit<'static>) -> Self {
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = cache().join("t").join(format!("{}-{n}", std::process::id()));
        std::fs::create_dir_all(path.join("snapshots")).unwrap();
        for shared in ["images", "kernels", "firecracker"] {
            std::os::unix::fs::symlink(cache().join(shared), path.join(shared)).unwrap();
        }
        for golden in golden_snapshots(&cache().join("t")) {
            link_folder(&golden, &path.join("snapshots").join(golden.file_name().unwrap()));
        }
        Self { path, _slot: slot }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Directory of a sandbox's VM.
    pub fn vm_dir(&self, id: &str) -> PathBuf {
        self.path.join("run").join("vm").join(id)
    }

    /// Every process that belongs to this home.
    pub fn processes(&self) -> Vec<Process> {
        processes_of(&self.path)
    }

    /// The process of a sandbox's VM.
    pub fn vm(&self, id: &str) -> Process {
        let found = processes_of(&self.vm_dir(id));
        assert_eq!(found.len(), 1, "processes of VM {id}: {found:?}");
        found.into_iter().next().unwrap()
    }

    /// The page server.
    pub fn pager(&self) -> Option<Process> {
        self.processes().into_iter().find(|p| p.name.starts_with("rethaw-pager"))
    }

    /// Ids of the VMs that are parked or claimed: not those on their way, such as the started
    /// process that a pool keeps in reserve.
    pub fn vm_ids(&self) -> Vec<String> {
        self.vms("stage IN ('parked', 'claimed')")
    }

    /// Ids of VMs on their way.
    pub fn vms_starting(&self) -> Vec<String> {
        self.vms("stage = 'starting'")
    }

    fn vms(&self, which: &str) -> Vec<String> {
        let db = rusqlite::Connection::open(self.path.join("state.db")).unwrap();
        db.busy_timeout(Duration::from_secs(10)).unwrap();
        let mut rows = db.prepare(&format!("SELECT id FROM vms WHERE {which}")).unwrap();
        rows.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    }

    /// Ids of the VMs that have a directory.
    pub fn vm_dirs(&self) -> Vec<String> {
        let dir = self.path.join("run").join("vm");
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Ids of the snapshots that belong to a sandbox.
    pub fn workspaces(&self) -> Vec<String> {
        let golden = golden_snapshots(&self.path);
        let dirs = std::fs::read_dir(self.path.join("snapshots")).unwrap().flatten();
        let paths = dirs.map(|entry| entry.path()).filter(|path| !golden.contains(path));
        paths.map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    /// Mounts below this home.
    pub fn mounts(&self) -> Vec<String> {
        let text = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let wanted = self.path.display().to_string();
        text.lines().filter(|line| line.contains(&wanted)).map(str::to_owned).collect()
    }

    /// Sockets below this home that still have a file.
    pub fn sockets(&self) -> Vec<PathBuf> {
        use std::os::unix::fs::FileTypeExt;
        let mut found = Vec::new();
        let mut dirs = vec![self.path.join("run")];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let Ok(kind) = entry.file_type() else { continue };
                if kind.is_dir() {
                    dirs.push(entry.path());
                } else if kind.is_socket() {
                    found.push(entry.path());
                }
            }
        }
        found
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Kills what runs in a home and removes it.
fn remove(home: &Path) {
    for process in processes_of(home) {
        process.kill();
    }
    // What is being killed may still be writing.
    for _ in 0..50 {
        match std::fs::remove_dir_all(home) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                std::thread::sleep(Duration::from_millis(20));
            }
            _ => return,
        }
    }
}

/// Sees to it that the cache has a golden snapshot that the service under test accepts: the service
/// itself decides, by starting on it once.
async fn warm_up() {
    let parent = cache().join("t");
    for dir in ["t", "images", "kernels"] {
        std::fs::create_dir_all(cache().join(dir)).unwrap();
    }
    let lock = File::create(parent.join(".lock")).unwrap();
    let lock = tokio::task::spawn_blocking(|| Flock::lock(lock, FlockArg::LockExclusive));
    let _lock = lock.await.unwrap().map_err(|(_, e)| e).unwrap();
    sweep(&parent);
    let spare = Box::leak(Box::new(Semaphore::new(1)));
    let home = Home::make(spare.acquire().await.unwrap());
    for golden in golden_snapshots(&cache()) {
        link_folder(&golden, &home.path.join("snapshots").join(golden.file_name().unwrap()));
    }
    let service = Service::start_on(home, 0, &[], BAKE_DEADLINE).await;
    let template = service.client().get("/v1/templates/base").await.expect(200);
    let id = template["snapshot"]["id"].as_str().unwrap();
    let shared = parent.join("snapshots").join(id);
    if !shared.exists() {
        // Those of other versions are of no more use.
        let _ = std::fs::remove_dir_all(parent.join("snapshots"));
        // Whole or not at all, as the service itself does it.
        let draft = parent.join("draft");
        let _ = std::fs::remove_dir_all(&draft);
        link_folder(&service.home().path().join("snapshots").join(id), &draft);
        std::fs::create_dir_all(parent.join("snapshots")).unwrap();
        std::fs::rename(&draft, &shared).unwrap();
    }
    service.stop().await;
}

/// Removes homes whose test run is no more.
fn sweep(parent: &Path) {
    for entry in std::fs::read_dir(parent).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((pid, _)) = name.split_once('-') else { continue };
        if !Path::new("/proc").join(pid).exists() {
            remove(&entry.path());
        }
    }
}

/// Snapshots that stand on nothing: templates made by a cold boot.
pub fn golden_snapshots(home: &Path) -> Vec<PathBuf> {
    let dirs = std::fs::read_dir(home.join("snapshots")).into_iter().flatten().flatten();
    let golden = |dir: &PathBuf| {
        let text = std::fs::read(dir.join("manifest.json")).ok();
        let manifest = text.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
        manifest.is_some_and(|manifest| manifest["parent"].is_null())
    };
    dirs.map(|entry| entry.path()).filter(golden).collect()
}

/// The same files under another name; published files are never written to.
fn link_folder(from: &Path, to: &Path) {
    if to.exists() {
        return;
    }
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(file.file_name());
        std::fs::hard_link(file.path(), &target)
            .or_else(|_| std::fs::copy(file.path(), &target).map(drop))
            .unwrap();
    }
}
