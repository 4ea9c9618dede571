//! What every test here needs: the real Firecracker, a page server, a frozen guest.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use snapshotter::firecracker::{Binaries, Firecracker, FirecrackerConfig};
use snapshotter::manifest;
use snapshotter::vmm::{BootSpec, Driver, MachineSize, MemoryBackend, Nic, RestoreSpec, Vm};
use tempfile::TempDir;
use uffd_handler::supervisor::{MemoryPlan, Supervisor, SupervisorConfig};

use crate::guest;

/// Nothing here takes a tenth of this, also on a loaded machine with an interpreting KVM.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const SIZE: MachineSize = MachineSize { vcpus: 1, memory_bytes: 128 << 20 };

const NO_CABLE: Nic = Nic { tap: None, netns: None };

/// The workspace's root.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The version these tests are about.
pub fn version() -> String {
    std::env::var("RETHAW_TEST_FIRECRACKER").unwrap_or_else(|_| "1.12.1".to_owned())
}

/// The installed Firecracker; gets it when there is none.
pub fn binaries() -> Binaries {
    static FOUND: OnceLock<Binaries> = OnceLock::new();
    FOUND
        .get_or_init(|| {
            let mut get = Command::new(workspace().join("scripts/get-firecracker"));
            let output = get.arg(version()).output();
            let output = output.expect("scripts/get-firecracker does not start");
            assert!(
                output.status.success(),
                "these tests need the real Firecracker: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            Binaries::in_dir(Path::new(String::from_utf8(output.stdout).unwrap().trim()))
        })
        .clone()
}

/// The page server, built when it is not there or old.
fn pager() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT
        .get_or_init(|| {
            // target/<profile>/deps/<this>
            let exe = std::env::current_exe().unwrap();
            let profile = exe.parent().and_then(Path::parent).unwrap();
            let mut cargo = Command::new(env!("CARGO"));
            cargo.args(["build", "--quiet", "-p", "rethaw-uffd", "--bin", "rethaw-pager"]);
            if profile.file_name().is_some_and(|n| n == "release") {
                cargo.arg("--release");
            }
            cargo.arg("--target-dir").arg(profile.parent().unwrap()).current_dir(workspace());
            assert!(cargo.status().expect("cargo does not start").success(), "no page server");
            profile.join("rethaw-pager")
        })
        .clone()
}

/// A driver, a page server, and a place for files. All of it goes with it.
pub struct Rig {
    pub driver: Firecracker,
    pub pager: Arc<Supervisor>,
    pub config: FirecrackerConfig,
    pub dir: TempDir,
}

/// A frozen guest.
pub struct Golden {
    pub dir: PathBuf,
    pub rounds: u64,
}

impl Rig {
    /// With VMs in jails, or without.
    pub async fn new(jailed: bool) -> Self {
        Self::with(|config| {
            if !jailed {
                config.jail = None;
            }
        })
        .await
    }

    /// With a configuration of its own.
    pub async fn with(change: impl FnOnce(&mut FirecrackerConfig)) -> Self {
        assert!(Path::new("/dev/kvm").exists(), "these tests need /dev/kvm");
        let dir = tempfile::Builder::new().prefix("rethaw-fc-").tempdir().unwrap();
        let mut config = FirecrackerConfig::new(binaries());
        config.restored_console = true;
        change(&mut config);
        let mut supervisor = SupervisorConfig::new(pager(), dir.path().join("pager.sock"));
        supervisor.log = Some(dir.path().join("pager.log"));
        let pager = Arc::new(Supervisor::start(supervisor).unwrap());
        let driver = Firecracker::new(config.clone(), Arc::clone(&pager)).await.unwrap();
        guest::write_elf(&dir.path().join("guest.elf"));
        std::fs::write(dir.path().join("base.img"), vec![7_u8; 1 << 20]).unwrap();
        Self { driver, pager, config, dir }
    }

    /// An id that no other VM has.
    pub fn id(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        format!("t{:010}{n:09}", std::process::id())
    }

    pub fn run_dir(&self, id: &str) -> PathBuf {
        let dir = self.dir.path().join("run").join(id);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    pub fn boot_spec(&self) -> BootSpec {
        let id = self.id();
        let run_dir = self.run_dir(&id);
        let scratch_disk = run_dir.join("disk.img");
        std::fs::write(&scratch_disk, vec![0_u8; 1 << 20]).unwrap();
        BootSpec {
            memory_file: run_dir.join("unused"),
            id,
            kernel: self.dir.path().join("guest.elf"),
            initrd: None,
            cmdline: "quiet".to_owned(),
            root_disk: self.dir.path().join("base.img"),
            scratch_disk,
            size: SIZE,
            nic: NO_CABLE,
            run_dir,
        }
    }

    /// Boots the guest, lets it work, freezes it.
    pub async fn golden(&self) -> Golden {
        let spec = self.boot_spec();
        let vm = self.driver.boot(&spec).await.unwrap();
        wait_for_rounds(&spec.run_dir, 3).await;
        let dir = self.dir.path().join("golden");
        std::fs::create_dir(&dir).unwrap();
        vm.pause().await.unwrap();
        let files = vm.snapshot(&dir, None).await.unwrap();
        vm.kill().await;
        assert_eq!(files.vmstate, dir.join(manifest::VMSTATE));
        assert_eq!(files.memory, Some(dir.join(manifest::MEMORY)));
        let memory = std::fs::read(dir.join(manifest::MEMORY)).unwrap();
        assert_eq!(memory.len() as u64, SIZE.memory_bytes);
        guest::check_image(&memory);
        Golden { dir, rounds: guest::rounds(&memory) }
    }

    pub fn restore_spec(&self, golden: &Golden, backend: MemoryBackend) -> RestoreSpec {
        let id = self.id();
        let run_dir = self.run_dir(&id);
        let scratch_disk = run_dir.join("disk.img");
        std::fs::write(&scratch_disk, vec![0_u8; 1 << 20]).unwrap();
        let memory_file = golden.dir.join(manifest::MEMORY);
        RestoreSpec {
            id,
            run_dir,
            vmstate: golden.dir.join(manifest::VMSTATE),
            vmstate_key: None,
            memory: MemoryPlan::flat(&memory_file, None),
            memory_file,
            backend,
            root_disk: self.dir.path().join("base.img"),
            scratch_disk,
            size: SIZE,
            nic: NO_CABLE,
            background: false,
        }
    }

    /// Restores and lets it run.
    pub async fn restore(&self, spec: &RestoreSpec) -> Box<dyn Vm> {
        let shell = self.driver.prepare(spec).await.unwrap();
        let (vm, _) = shell.load().await.unwrap();
        vm.resume().await.unwrap();
        vm
    }

    /// Fails when anything of a VM is left on this host.
    pub fn assert_gone(&self, id: &str, run_dir: &Path) {
        assert!(!run_dir.join("jail").exists() && !run_dir.join("fc").exists(), "a home is left");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(id), "a mount is left:\n{mounts}");
        for folder in self.cgroup_folders(id) {
            assert!(!folder.exists(), "{folder:?} is left");
        }
        assert!(!self.pager.vms().iter().any(|vm| vm == id), "the page server still has it");
    }

    /// The control groups VM `id` has when it is jailed.
    pub fn cgroup_folders(&self, id: &str) -> Vec<PathBuf> {
        let parent = self.config.jail.as_ref().map_or("rethaw", |j| &j.cgroup_parent);
        snapshotter::firecracker::Cgroups::detect().folders(parent, id)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.pager.shutdown();
    }
}

/// What the guest has said.
pub fn console(run_dir: &Path) -> String {
    let text = std::fs::read(run_dir.join("console.log")).unwrap_or_default();
    // Firecracker itself says a few things there before its log is open.
    String::from_utf8_lossy(&text).lines().filter(|l| !l.contains("[")).collect()
}

/// Waits until the guest has done `rounds` rounds; fails when it found something wrong.
pub async fn wait_for_rounds(run_dir: &Path, rounds: usize) {
    let started = Instant::now();
    loop {
        let text = console(run_dir);
        assert!(!text.contains('X'), "the guest found wrong memory: {text:?}");
        if text.matches('.').count() >= rounds {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "{rounds} rounds did not come: {text:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
