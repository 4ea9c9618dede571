//! Control groups for jails: which kind the host has, what the jailer is told, what is removed.
//!
//! Firecracker's jailer makes the groups itself, under a parent of ours, and speaks version 1 or 2.
//! Hosts have either, or both mounted at once with the controllers in one of them, so the version is
//! taken from where the `memory` controller is. A host with neither gets no groups, and says so in
//! its log.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::vmm::MachineSize;

/// What Firecracker needs beyond its guest's memory: its own, and page tables and the page cache of
/// the disk, which is given back under pressure.
const OVERHEAD_BYTES: u64 = 64 << 20;
/// Threads of one Firecracker: vCPUs, the API's, the VMM's, and workers of `io_uring`.
const MAX_THREADS_BESIDES_VCPUS: u32 = 64;

/// The control groups of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cgroups {
    /// Version 1: one folder per controller.
    V1 {
        /// Controllers that can be used, with the folder each is mounted on.
        controllers: Vec<(Controller, PathBuf)>,
    },
    /// Version 2: one folder.
    V2 {
        /// The mount point.
        mount: PathBuf,
        /// Controllers that can be used.
        controllers: Vec<Controller>,
    },
    /// None that could limit anything.
    None,
}

/// Controllers that jails use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Controller {
    /// Limits memory.
    Memory,
    /// Limits processes and threads.
    Pids,
}

impl Controller {
    const ALL: [Self; 2] = [Self::Memory, Self::Pids];

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }
}

impl Cgroups {
    /// Looks at this host.
    pub fn detect() -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        Self::from_mounts(&mounts, |dir| {
            std::fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default()
        })
    }

    /// As [`Cgroups::detect`], from the text of `/proc/self/mounts` and a reader of version 2's
    /// `cgroup.controllers`.
    fn from_mounts(mounts: &str, v2_controllers: impl Fn(&Path) -> String) -> Self {
        let fields = |line: &str| {
            let mut f = line.split(' ').skip(1).map(str::to_owned);
            Some((f.next()?, f.next()?, f.next()?))
        };
        let (mut v1, mut v2) = (Vec::new(), None);
        for (dir, kind, options) in mounts.lines().filter_map(fields) {
            match kind.as_str() {
                "cgroup" => {
                    for c in Controller::ALL {
                        if options.split(',').any(|o| o == c.name()) {
                            v1.push((c, PathBuf::from(&dir)));
                        }
                    }
                }
                "cgroup2" if v2.is_none() => {
                    let has = v2_controllers(Path::new(&dir));
                    let here = |c: &Controller| has.split_whitespace().any(|n| n == c.name());
                    let controllers: Vec<_> = Controller::ALL.into_iter().filter(here).collect();
                    v2 = Some((PathBuf::from(&dir), controllers));
                }
                _ => {}
            }
        }
        match v2 {
            Some((mount, controllers)) if !controllers.is_empty() => {
                Self::V2 { mount, controllers }
            }
            _ if !v1.is_empty() => Self::V1 { controllers: v1 },
            _ => Self::None,
        }
    }

    /// The jailer's arguments that put a VM of `size` into groups of its own under `parent`.
    pub fn jailer_args(&self, parent: &str, size: MachineSize) -> Vec<String> {
        let memory = size.memory_bytes + OVERHEAD_BYTES;
        let pids = size.vcpus + MAX_THREADS_BESIDES_VCPUS;
        let (version, controllers): (&str, Vec<Controller>) = match self {
            Self::None => return Vec::new(),
            Self::V1 { controllers } => ("1", controllers.iter().map(|(c, _)| *c).collect()),
            Self::V2 { controllers, .. } => ("2", controllers.clone()),
        };
        let mut args: Vec<String> =
            ["--cgroup-version", version, "--parent-cgroup", parent].map(String::from).into();
        for controller in controllers {
            let limit = match (controller, version) {
                (Controller::Memory, "1") => format!("memory.limit_in_bytes={memory}"),
                (Controller::Memory, _) => format!("memory.max={memory}"),
                (Controller::Pids, _) => format!("pids.max={pids}"),
            };
            args.extend(["--cgroup".to_owned(), limit]);
        }
        args
    }

    /// The folders of VM `id`'s groups.
    pub fn folders(&self, parent: &str, id: &str) -> Vec<PathBuf> {
        match self {
            Self::None => Vec::new(),
            Self::V1 { controllers } => {
                controllers.iter().map(|(_, mount)| mount.join(parent).join(id)).collect()
            }
            Self::V2 { mount, .. } => vec![mount.join(parent).join(id)],
        }
    }

    /// Removes VM `id`'s groups, whose process is gone.
    pub fn remove(&self, parent: &str, id: &str) -> io::Result<()> {
        let mut result = Ok(());
        for folder in self.folders(parent, id) {
            result = result.and(remove_group(&folder));
        }
        result
    }
}

/// A group is busy until the kernel has put its last task away, which for a process that was just
/// reaped is a matter of microseconds; there is no event for it.
fn remove_group(folder: &Path) -> io::Result<()> {
    const TRIES: u32 = 50;
    for attempt in 1.. {
        match std::fs::remove_dir(folder) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && attempt < TRIES => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => return other,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: MachineSize = MachineSize { vcpus: 2, memory_bytes: 128 << 20 };

    const HYBRID: &str = "\
tmpfs /sys/fs/cgroup tmpfs rw,relatime,mode=755 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
";

    #[test]
    fn a_version_2_host_is_told_in_version_2() {
        let mounts = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
        let c = Cgroups::from_mounts(mounts, |_| "cpuset cpu io memory pids\n".into());
        let args = c.jailer_args("rethaw", SIZE).join(" ");
        assert_eq!(
            args,
            "--cgroup-version 2 --parent-cgroup rethaw --cgroup memory.max=201326592 \
             --cgroup pids.max=66"
        );
        assert_eq!(c.folders("rethaw", "x"), [PathBuf::from("/sys/fs/cgroup/rethaw/x")]);
    }

    #[test]
    fn an_empty_version_2_beside_version_1_is_not_taken() {
        let c = Cgroups::from_mounts(HYBRID, |_| "\n".into());
        let args = c.jailer_args("rethaw", SIZE).join(" ");
        assert_eq!(
            args,
            "--cgroup-version 1 --parent-cgroup rethaw \
             --cgroup memory.limit_in_bytes=201326592 --cgroup pids.max=66"
        );
        let folders = c.folders("rethaw", "x");
        assert_eq!(
            folders,
            ["/sys/fs/cgroup/memory/rethaw/x", "/sys/fs/cgroup/pids/rethaw/x"].map(PathBuf::from)
        );
    }

    #[test]
    fn without_controllers_there_are_no_groups() {
        let c = Cgroups::from_mounts("proc /proc proc rw 0 0\n", |_| String::new());
        assert_eq!(c, Cgroups::None);
        assert!(c.jailer_args("rethaw", SIZE).is_empty());
        assert!(c.remove("rethaw", "x").is_ok());
    }

    #[test]
    fn a_group_that_is_gone_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let c = Cgroups::V2 { mount: dir.path().to_owned(), controllers: vec![] };
        assert!(c.remove("rethaw", "x").is_ok());
        std::fs::create_dir_all(dir.path().join("rethaw/x/child")).unwrap();
        assert!(c.remove("rethaw", "x").is_err(), "a folder with something in it cannot go");
        std::fs::remove_dir(dir.path().join("rethaw/x/child")).unwrap();
        assert!(c.remove("rethaw", "x").is_ok());
        assert!(!dir.path().join("rethaw/x").exists());
    }
}
