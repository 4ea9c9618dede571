//! Snapshots that cannot be loaded, versions that must not, processes that hang or die: each with
//! the reason, in time, and nothing left.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snapshotter::firecracker::{Binaries, Firecracker, FirecrackerConfig};
use snapshotter::manifest;
use snapshotter::vmm::{Driver, MemoryBackend, RestoreSpec, VmmError};

use crate::rig::{Golden, PATIENCE, Rig, version, wait_for_rounds};

/// Loads what must not load; gives the error.
async fn refused(rig: &Rig, spec: &RestoreSpec) -> VmmError {
    let started = Instant::now();
    let shell = rig.driver.prepare(spec).await.unwrap();
    let error = shell.load().await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    rig.assert_gone(&spec.id, &spec.run_dir);
    error
}

/// A spec whose device state was changed by `change`.
fn with_state(rig: &Rig, golden: &Golden, change: impl FnOnce(&mut Vec<u8>)) -> RestoreSpec {
    let mut spec = rig.restore_spec(golden, MemoryBackend::Uffd);
    let mut state = std::fs::read(&spec.vmstate).unwrap();
    change(&mut state);
    spec.vmstate = spec.run_dir.join("changed");
    std::fs::write(&spec.vmstate, state).unwrap();
    spec
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_snapshots_are_refused_in_firecrackers_own_words() {
    let rig = Rig::new(true).await;
    let golden = rig.golden().await;
    let flipped = with_state(&rig, &golden, |state| {
        let middle = state.len() / 2;
        state[middle] ^= 0x10;
    });
    let e = refused(&rig, &flipped).await;
    println!("flipped bit: {e}");
    assert!(matches!(&e, VmmError::Refused { .. }), "{e}");
    assert!(e.to_string().to_lowercase().contains("crc"), "{e}");

    let cut = with_state(&rig, &golden, |state| state.truncate(state.len() / 2));
    let e = refused(&rig, &cut).await;
    println!("cut in half: {e}");
    assert!(matches!(&e, VmmError::Refused { .. }), "{e}");

    // The version is near the start of the file; a release's snapshot of the future has another.
    let future = with_state(&rig, &golden, |state| {
        let length = state.len() - 8;
        // A text among the first bytes; where exactly depends on the release.
        let format = rig.driver.identity().snapshot_format.clone();
        let format = format.trim_start_matches('v').as_bytes();
        let at = state[..64].windows(format.len()).position(|w| w == format).unwrap();
        state[at] += 1;
        let crc = crc64(&state[..length]);
        state[length..].copy_from_slice(&crc.to_le_bytes());
    });
    let e = refused(&rig, &future).await;
    println!("other version: {e}");
    assert!(matches!(&e, VmmError::Refused { .. }), "{e}");
    assert!(e.to_string().to_lowercase().contains("version"), "{e}");

    // Memory of the wrong size is the page server's to notice, and the VM must not run.
    let mut short = rig.restore_spec(&golden, MemoryBackend::Uffd);
    let file = short.run_dir.join("short");
    std::fs::write(&file, vec![0_u8; 1 << 20]).unwrap();
    short.memory = uffd_handler::supervisor::MemoryPlan::flat(&file, None);
    let e = refused(&rig, &short).await;
    println!("short memory: {e}");
    assert!(matches!(&e, VmmError::Memory { .. }), "{e}");

    // A disk is opened after the handshake: the page server must forget the VM again.
    let late = rig.restore_spec(&golden, MemoryBackend::Uffd);
    let shell = rig.driver.prepare(&late).await.unwrap();
    let home = late.run_dir.join("jail/firecracker").join(&late.id).join("root");
    std::fs::remove_file(home.join("scratch.img")).unwrap();
    let e = shell.load().await.unwrap_err();
    println!("no disk: {e}");
    assert!(e.to_string().contains("/snapshot/load"), "{e}");
    rig.assert_gone(&late.id, &late.run_dir);

    // And with all that behind it, the driver still works.
    let spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
    let vm = rig.restore(&spec).await;
    wait_for_rounds(&spec.run_dir, 1).await;
    vm.kill().await;
}

/// CRC-64 as the `crc64` crate computes it (Jones' polynomial, reflected): what Firecracker ends its
/// device state with.
fn crc64(bytes: &[u8]) -> u64 {
    let mut crc = 0_u64;
    for byte in bytes {
        crc ^= u64::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x95ac_9329_ac4b_c9b5 } else { crc >> 1 };
        }
    }
    crc
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_are_gated_before_anything_starts() {
    let rig = Rig::new(true).await;
    let installed = version();
    assert_eq!(rig.driver.identity().version.to_string(), installed);
    assert_eq!(rig.driver.compat().facts["vmm_version"], installed);
    if installed == "1.12.1" {
        assert_eq!(rig.driver.identity().snapshot_format, "v6.0.0");
    }
    for (version, word) in [("1.16.0", "vsock"), ("1.11.0", "1.12.1"), ("1.14.0", "between")] {
        let dir = rig.dir.path().join(version);
        std::fs::create_dir(&dir).unwrap();
        let binaries = Binaries::in_dir(&dir);
        std::fs::write(&binaries.firecracker, format!("#!/bin/sh\necho Firecracker v{version}\n"))
            .unwrap();
        let executable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&binaries.firecracker, executable).unwrap();
        let config = FirecrackerConfig::new(binaries);
        let e = Firecracker::new(config, rig.pager.clone()).await.unwrap_err().to_string();
        assert!(e.contains(version) && e.contains(word), "{e}");
    }
    let config = FirecrackerConfig::new(Binaries::in_dir(rig.dir.path()));
    let e = Firecracker::new(config, rig.pager.clone()).await.unwrap_err().to_string();
    assert!(e.contains("firecracker") && e.contains("No such file"), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_firecracker_that_hangs_meets_the_deadline_and_one_that_dies_is_told() {
    let rig = Rig::new(true).await;
    let golden = rig.golden().await;
    let spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
    let vm = rig.restore(&spec).await;
    let pid = Pid::from_raw(vm.record().process.pid);
    kill(pid, Signal::SIGSTOP).unwrap();
    let started = Instant::now();
    let e = vm.pause().await.unwrap_err();
    assert!(matches!(e, VmmError::Timeout { .. }), "{e}");
    assert!(started.elapsed() < PATIENCE / 2);
    kill(pid, Signal::SIGKILL).unwrap();
    let e = vm.resume().await.unwrap_err();
    println!("{e}");
    assert!(
        e.to_string().contains("killed by signal 9") || e.to_string().contains("is gone"),
        "{e}"
    );
    vm.kill().await;
    rig.assert_gone(&spec.id, &spec.run_dir);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_cannot_boot_says_why() {
    let rig = Rig::new(true).await;
    let mut spec = rig.boot_spec();
    spec.kernel = rig.dir.path().join("base.img");
    let e = rig.driver.boot(&spec).await.unwrap_err();
    println!("{e}");
    assert!(matches!(&e, VmmError::Refused { .. }), "{e}");
    rig.assert_gone(&spec.id, &spec.run_dir);
    let mut spec = rig.boot_spec();
    spec.root_disk = rig.dir.path().join(manifest::MANIFEST);
    let e = rig.driver.boot(&spec).await.unwrap_err();
    assert!(matches!(&e, VmmError::File { .. }), "{e}");
    rig.assert_gone(&spec.id, &spec.run_dir);
    let spec = rig.boot_spec();
    std::fs::set_permissions(&spec.root_disk, std::fs::Permissions::from_mode(0o600)).unwrap();
    let e = rig.driver.boot(&spec).await.unwrap_err();
    assert!(e.to_string().contains("cannot read"), "{e}");
    rig.assert_gone(&spec.id, &spec.run_dir);
}
