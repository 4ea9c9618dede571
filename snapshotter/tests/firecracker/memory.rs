//! Memory through the page server: many clones, working sets, a killed page server, diffs.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snapshotter::manifest;
use snapshotter::vmm::{Driver, MemoryBackend};
use uffd_handler::source::{LayerFiles, MemoryLayers};
use uffd_handler::supervisor::MemoryPlan;

use crate::guest::{self, COUNTERS_AT, PATTERN_AT, PATTERN_PAGES};
use crate::rig::{Golden, PATIENCE, Rig, SIZE, console, wait_for_rounds};

#[tokio::test(flavor = "multi_thread")]
async fn ten_clones_at_once_each_with_the_right_memory() {
    let rig = Arc::new(Rig::new(true).await);
    let golden = Arc::new(rig.golden().await);
    let digest = std::fs::read(golden.dir.join(manifest::MEMORY)).unwrap();
    let mut clones = Vec::new();
    for _ in 0..10 {
        let (rig, golden) = (Arc::clone(&rig), Arc::clone(&golden));
        clones.push(tokio::spawn(async move {
            let spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
            let vm = rig.restore(&spec).await;
            (vm, spec)
        }));
    }
    let mut vms = Vec::new();
    for clone in clones {
        vms.push(clone.await.unwrap());
    }
    let mut uids: Vec<_> = vms.iter().map(|(vm, _)| vm.record().details["uid"].clone()).collect();
    uids.sort();
    uids.dedup();
    assert_eq!(uids.len(), 10, "every VM has a user of its own");
    for (_, spec) in &vms {
        wait_for_rounds(&spec.run_dir, 2).await;
        // Every page the guest looks at came by a fault of its own.
        let stats = rig.pager.vm_stats(&spec.id).unwrap();
        assert!(stats.faults() >= 2 * PATTERN_PAGES, "{stats:?}");
    }
    for (vm, spec) in &vms {
        vm.kill().await;
        rig.assert_gone(&spec.id, &spec.run_dir);
    }
    let after = std::fs::read(golden.dir.join(manifest::MEMORY)).unwrap();
    assert!(after == digest, "clones must not write to the snapshot");
}

/// The page server is killed in the middle of ten restores, again and again: Firecracker waits for
/// pages while it loads, and all ten come up all the same.
#[tokio::test(flavor = "multi_thread")]
async fn ten_restores_at_once_outlive_their_page_servers() {
    let rig = Arc::new(Rig::new(true).await);
    let golden = Arc::new(rig.golden().await);
    let mut clones = tokio::task::JoinSet::new();
    for _ in 0..10 {
        let (rig, golden) = (Arc::clone(&rig), Arc::clone(&golden));
        clones.spawn(async move {
            let spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
            let vm = rig.restore(&spec).await;
            (vm, spec)
        });
    }
    let mut vms = Vec::new();
    let mut kills = 0;
    while let Some(clone) = clones.join_next().await {
        vms.push(clone.unwrap());
        // With some loaded, some loading and some not begun.
        if vms.len() % 3 == 1 {
            let pager = rig.pager.pager_pid();
            if pager > 0 {
                kill(Pid::from_raw(pager), Signal::SIGKILL).unwrap();
                kills += 1;
            }
        }
    }
    println!("{kills} kills, {} restarts", rig.pager.restarts());
    assert!(kills > 0);
    for (_, spec) in &vms {
        wait_for_rounds(&spec.run_dir, 2).await;
    }
    for (vm, spec) in &vms {
        vm.kill().await;
        rig.assert_gone(&spec.id, &spec.run_dir);
    }
}

/// The oracle of all these tests works: one wrong byte does not go unnoticed.
#[tokio::test(flavor = "multi_thread")]
async fn the_guest_notices_one_wrong_byte() {
    let rig = Rig::new(false).await;
    let golden = rig.golden().await;
    for at in [PATTERN_AT + 77 * 8192 + 1234, PATTERN_AT + 4096, COUNTERS_AT] {
        let mut spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
        let wrong = spec.run_dir.join("wrong");
        std::fs::copy(golden.dir.join(manifest::MEMORY), &wrong).unwrap();
        let file = std::fs::File::options().read(true).write(true).open(&wrong).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        // Bit 5: no counter gets that far, so none can be right by chance.
        file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
        spec.memory = MemoryPlan::flat(&wrong, None);
        let vm = rig.restore(&spec).await;
        let started = Instant::now();
        while !console(&spec.run_dir).contains('X') {
            assert!(started.elapsed() < PATIENCE, "a wrong byte at {at:#x} went unnoticed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        vm.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_working_set_comes_before_it_is_asked_for() {
    let rig = Rig::new(false).await;
    let golden = rig.golden().await;
    let mut spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
    spec.memory.record = true;
    let vm = rig.restore(&spec).await;
    wait_for_rounds(&spec.run_dir, 2).await;
    let cold = rig.pager.vm_stats(&spec.id).unwrap().faults();
    let set = rig.pager.recording(&spec.id).unwrap();
    vm.kill().await;
    for i in 0..2 * PATTERN_PAGES {
        assert!(set.contains(PATTERN_AT / 4096 + i), "page {i} of the pattern is not in it");
    }
    assert!(set.contains(COUNTERS_AT / 4096));
    assert!(!set.contains(SIZE.memory_bytes / 4096 - 1), "nobody touched the last page");
    let file = golden.dir.join(manifest::WORKING_SET);
    set.save(&file).unwrap();

    let mut spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
    spec.memory.working_set = Some(file);
    let shell = rig.driver.prepare(&spec).await.unwrap();
    let (vm, _) = shell.load().await.unwrap();
    assert!(rig.pager.wait_prefetched(&spec.id, PATIENCE).unwrap());
    vm.resume().await.unwrap();
    wait_for_rounds(&spec.run_dir, 2).await;
    let warm = rig.pager.vm_stats(&spec.id).unwrap().faults();
    println!("{cold} faults cold, {warm} with the working set in place");
    assert!(warm * 10 < cold, "{warm} faults, {cold} without the working set");
    vm.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_page_server_is_a_pause_and_not_a_loss() {
    let rig = Rig::new(true).await;
    let golden = rig.golden().await;
    let mut vms = Vec::new();
    for _ in 0..3 {
        let spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
        let vm = rig.restore(&spec).await;
        // Now: most of its pages are still to come.
        let faults = rig.pager.vm_stats(&spec.id).unwrap().faults();
        kill(Pid::from_raw(rig.pager.pager_pid()), Signal::SIGKILL).unwrap();
        vms.push((vm, spec, faults));
        let restarts = vms.len() as u64;
        let started = Instant::now();
        while rig.pager.restarts() < restarts || rig.pager.pager_pid() == 0 {
            assert!(started.elapsed() < PATIENCE, "no new page server");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    let before: Vec<u64> = vms.iter().map(|(.., faults)| *faults).collect();
    println!("faults served before the kills: {before:?}");
    for (_, spec, _) in &vms {
        wait_for_rounds(&spec.run_dir, 3).await;
    }
    for (vm, spec, _) in &vms {
        vm.kill().await;
        rig.assert_gone(&spec.id, &spec.run_dir);
    }
}

/// A chain whose top is the delta in `dir`.
fn with_delta(golden: &Golden, dir: &Path) -> Vec<LayerFiles> {
    let delta = dir.join(manifest::DELTA);
    let mut index = delta.clone().into_os_string();
    index.push(".index");
    let flat = LayerFiles::Flat { memory: golden.dir.join(manifest::MEMORY), zero_map: None };
    vec![flat, LayerFiles::Delta { data: delta, index: index.into() }]
}

/// Reads a whole chain.
fn image(layers: &[LayerFiles]) -> Vec<u8> {
    let chain = MemoryLayers::open(layers, SIZE.memory_bytes).unwrap();
    let mut memory = vec![0_u8; SIZE.memory_bytes as usize];
    for (page, buffer) in memory.chunks_mut(4096).enumerate() {
        // Zero pages leave the buffer as it is: zeros.
        chain.read_page(page as u64, buffer).unwrap();
    }
    memory
}

async fn diff_on_diff(jailed: bool, backend: MemoryBackend) {
    let rig = Rig::new(jailed).await;
    let golden = rig.golden().await;
    let spec = rig.restore_spec(&golden, backend);
    let vm = rig.restore(&spec).await;
    wait_for_rounds(&spec.run_dir, 2).await;
    vm.pause().await.unwrap();
    let first = rig.dir.path().join("first");
    std::fs::create_dir(&first).unwrap();
    let files = vm.snapshot(&first, None).await.unwrap();
    assert_eq!((files.memory, files.delta), (None, Some(first.join(manifest::DELTA))));
    let size = std::fs::metadata(first.join(manifest::DELTA)).unwrap().len();
    assert!((32 * 4096..2 << 20).contains(&size), "{size} bytes of changes");

    // A second snapshot of the same VM is on the same base, not on the first.
    vm.resume().await.unwrap();
    let so_far = console(&spec.run_dir).matches('.').count();
    wait_for_rounds(&spec.run_dir, so_far + 2).await;
    vm.pause().await.unwrap();
    let second = rig.dir.path().join("second");
    std::fs::create_dir(&second).unwrap();
    vm.snapshot(&second, None).await.unwrap();
    vm.kill().await;
    rig.assert_gone(&spec.id, &spec.run_dir);

    let mut last = golden.rounds;
    for dir in [&first, &second] {
        let layers = with_delta(&golden, dir);
        let memory = image(&layers);
        guest::check_image(&memory);
        let rounds = guest::rounds(&memory);
        assert!(rounds > last, "{rounds} rounds after {last}");
        last = rounds;
        // And it runs: registers and memory are of the same instant, or the guest would say X.
        let mut spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
        spec.vmstate = dir.join(manifest::VMSTATE);
        spec.memory.layers = layers;
        let vm = rig.restore(&spec).await;
        wait_for_rounds(&spec.run_dir, 2).await;
        vm.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn diffs_of_a_lazily_restored_vm() {
    diff_on_diff(true, MemoryBackend::Uffd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn diffs_of_a_vm_restored_from_a_file() {
    diff_on_diff(false, MemoryBackend::File).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_on_huge_pages_are_restored_by_the_page_server() {
    let pages = SIZE.memory_bytes >> 21;
    let Some(_reserved) = crate::huge_pages::Reserved::new(2 * pages + 4) else { return };
    let rig = Rig::with(|config| config.huge_pages = true).await;
    let golden = rig.golden().await;
    let spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
    let vm = rig.restore(&spec).await;
    wait_for_rounds(&spec.run_dir, 2).await;
    let stats = rig.pager.vm_stats(&spec.id).unwrap();
    // A fault brings 2 MiB: 512 times fewer of them than pages of the pattern.
    assert!((1..=pages).contains(&stats.faults()), "{stats:?}");
    vm.kill().await;
    rig.assert_gone(&spec.id, &spec.run_dir);
    // A mapped file has no huge pages, and Firecracker says so.
    let spec = rig.restore_spec(&golden, MemoryBackend::File);
    let shell = rig.driver.prepare(&spec).await.unwrap();
    let e = shell.load().await.unwrap_err();
    println!("huge pages from a file: {e}");
    rig.assert_gone(&spec.id, &spec.run_dir);
}
