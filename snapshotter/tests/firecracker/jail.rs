//! What a jail is made of, and that nothing of it stays.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use snapshotter::firecracker::{Cgroups, Firecracker};
use snapshotter::process::ExitReason;
use snapshotter::vmm::{Driver, MemoryBackend, Priority};

use crate::rig::{Rig, SIZE, wait_for_rounds};

fn status(pid: i32, field: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jailed_vm_is_nobody_in_an_empty_place() {
    let rig = Rig::new(true).await;
    let golden = rig.golden().await;
    let spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
    let vm = rig.restore(&spec).await;
    let record = vm.record();
    let (pid, uid) = (record.process.pid, record.details["uid"].parse::<u32>().unwrap());
    assert!(uid >= 1_900_000_000);
    assert_eq!(status(pid, "Uid:"), uid.to_string());
    assert_eq!(status(pid, "Gid:"), uid.to_string());
    assert_eq!(status(pid, "CapEff:"), "0000000000000000");
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let tid = task.unwrap().file_name().into_string().unwrap().parse().unwrap();
        assert_eq!(status(tid, "Seccomp:"), "2", "thread {tid} is filtered");
    }
    let root = std::fs::read_link(format!("/proc/{pid}/root")).unwrap();
    assert_eq!(root, Path::new("/"), "its own mount namespace has nothing but its jail");
    let root = format!("/proc/{pid}/root");
    let mut names: Vec<_> = std::fs::read_dir(&root)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    println!("{names:?}");
    assert!(!names.contains(&"etc".to_owned()) && !names.contains(&"uffd.sock".to_owned()));
    let scratch = std::fs::metadata(format!("{root}/scratch.img")).unwrap();
    assert_eq!((scratch.uid(), scratch.ino()), (uid, spec_inode(&spec.scratch_disk)));
    let base = std::fs::metadata(format!("{root}/root.img")).unwrap();
    assert_ne!(base.uid(), uid, "the shared image belongs to nobody's VM");
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = limits.lines().find(|l| l.starts_with("Max file size")).unwrap();
    assert!(limit.contains(&SIZE.memory_bytes.to_string()), "{limit}");
    let net = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(net(&pid.to_string()), net("self"), "a VM without a network has its own");
    if Cgroups::detect() != Cgroups::None {
        for folder in rig.cgroup_folders(&spec.id) {
            let procs = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap();
            assert_eq!(procs.trim(), pid.to_string(), "{folder:?}");
        }
    }
    vm.kill().await;
    assert_eq!(vm.exited().await, ExitReason::Unknown, "it was reaped by the kill");
    rig.assert_gone(&spec.id, &spec.run_dir);
}

fn spec_inode(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().ino()
}

#[tokio::test(flavor = "multi_thread")]
async fn shells_prepared_ahead_leave_nothing_when_dropped() {
    let rig = Rig::new(true).await;
    let golden = rig.golden().await;
    let specs: Vec<_> = (0..4).map(|_| rig.restore_spec(&golden, MemoryBackend::Uffd)).collect();
    let mut shells = Vec::new();
    for spec in &specs {
        shells.push(rig.driver.prepare(spec).await.unwrap());
        assert!(
            spec.run_dir.join("jail/firecracker").join(&spec.id).join("root/api.sock").exists()
        );
    }
    let pid = shells[0].record().process.pid;
    drop(shells);
    for spec in &specs {
        rig.assert_gone(&spec.id, &spec.run_dir);
    }
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    // A start that is given up half-way leaves nothing either.
    for micros in [0, 500, 2_000, 5_000, 10_000, 20_000] {
        let spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
        let limit = std::time::Duration::from_micros(micros);
        drop(tokio::time::timeout(limit, rig.driver.prepare(&spec)).await);
        rig.assert_gone(&spec.id, &spec.run_dir);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_service_left_is_not_in_the_way() {
    let rig = Rig::new(true).await;
    let golden = rig.golden().await;
    let spec = rig.restore_spec(&golden, MemoryBackend::File);
    let root = spec.run_dir.join("jail/firecracker").join(&spec.id).join("root");
    std::fs::create_dir_all(root.join("dev")).unwrap();
    for name in ["root.img", "scratch.img", "vmstate", "memory"] {
        std::fs::write(root.join(name), "stale").unwrap();
    }
    for name in ["api.sock", "v.sock", "uffd.sock"] {
        drop(std::os::unix::net::UnixListener::bind(root.join(name)).unwrap());
    }
    let vm = rig.restore(&spec).await;
    wait_for_rounds(&spec.run_dir, 1).await;
    vm.kill().await;
    rig.assert_gone(&spec.id, &spec.run_dir);
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_on_another_filesystem_are_mounted_and_unmounted() {
    let rig = Rig::new(true).await;
    let golden = rig.golden().await;
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut spec = rig.restore_spec(&golden, MemoryBackend::File);
    let device = |p: &Path| std::fs::metadata(p).unwrap().dev();
    assert_ne!(device(elsewhere.path()), device(&spec.run_dir), "/dev/shm is a filesystem apart");
    for path in [&mut spec.root_disk, &mut spec.scratch_disk, &mut spec.memory_file] {
        let there = elsewhere.path().join(path.file_name().unwrap());
        std::fs::copy(&*path, &there).unwrap();
        *path = there;
    }
    let vm = rig.restore(&spec).await;
    wait_for_rounds(&spec.run_dir, 2).await;
    vm.kill().await;
    rig.assert_gone(&spec.id, &spec.run_dir);
    assert!(spec.root_disk.exists() && spec.scratch_disk.exists(), "the disks themselves stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_service_takes_a_vm_back() {
    for jailed in [true, false] {
        let rig = Rig::new(jailed).await;
        let golden = rig.golden().await;
        let spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
        let vm = rig.restore(&spec).await;
        let record = vm.record();
        vm.leave_running();
        drop(vm);
        wait_for_rounds(&spec.run_dir, 2).await;
        let second = Firecracker::new(rig.config.clone(), rig.pager.clone()).await.unwrap();
        let vm = second.adopt(&record).await.unwrap();
        assert_eq!(vm.record(), record);
        vm.pause().await.unwrap();
        let dir = rig.dir.path().join("of-adopted");
        std::fs::create_dir(&dir).unwrap();
        assert!(vm.snapshot(&dir, None).await.unwrap().delta.is_some());
        vm.resume().await.unwrap();
        vm.kill().await;
        rig.assert_gone(&spec.id, &spec.run_dir);
        let e = second.adopt(&record).await.unwrap_err();
        assert!(e.to_string().contains("not running"), "{e}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refills_run_at_low_priority_until_told_otherwise() {
    let rig = Rig::new(true).await;
    let golden = rig.golden().await;
    let mut spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
    spec.background = true;
    let vm = rig.restore(&spec).await;
    let pid = vm.record().process.pid;
    // Field 41 of proc_pid_stat(5): 0 is SCHED_OTHER, 5 is SCHED_IDLE.
    let policies = || -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        tasks
            .map(|t| std::fs::read_to_string(t.unwrap().path().join("stat")).unwrap())
            .map(|stat| stat.rsplit_once(')').unwrap().1.split(' ').nth(39).unwrap().to_owned())
            .collect()
    };
    let before = policies();
    assert!(before.len() >= 3 && before.iter().all(|p| p == "5"), "{before:?}");
    vm.set_priority(Priority::Normal);
    assert!(policies().iter().all(|p| p == "0"));
    vm.kill().await;
}
