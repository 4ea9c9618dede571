//! The shim with the real QEMU: a guest is frozen, restored lazily, and compares all its memory.
//!
//! Skipped, loudly, where no QEMU is installed.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

#[path = "qemu_guest/code.rs"]
mod code;
#[path = "qemu_guest/machine.rs"]
mod machine;
mod rig;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use machine::{DEADLINE, Qemu, freeze};
use uffd_handler::handshake::{self, Expect};
use uffd_handler::source::ZeroMap;
use uffd_handler::supervisor::{MemoryPlan, PagerEvent};

#[test]
fn a_frozen_guest_thaws_with_all_its_memory() {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    freeze(dir);
    let zero = dir.join("memory.zero");
    ZeroMap::scan(&dir.join("memory")).unwrap().save(&zero).unwrap();
    let shim = rig::shim();
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    let shared = Path::new("/dev/shm").join(format!("rethaw-test-{}", std::process::id()));
    let backends = [
        "memory-backend-memfd,id=mem,size=32M,share=on".to_string(),
        format!("memory-backend-file,id=mem,size=32M,share=on,mem-path={}", shared.display()),
    ];
    for (i, backend) in backends.iter().enumerate() {
        let _ = std::fs::remove_file(dir.join("out"));
        let socket = dir.join(format!("handshake-{i}"));
        let listener = UnixListener::bind(&socket).unwrap();
        let qemu = Qemu::start(
            dir,
            backend,
            &["-S", "-incoming", "defer"],
            &[
                ("LD_PRELOAD", shim.to_str().unwrap()),
                ("RETHAW_UFFD_SIZE", &code::MEMORY_BYTES.to_string()),
                ("RETHAW_UFFD_SOCKET", socket.to_str().unwrap()),
            ],
        );
        let expect = Expect {
            memory_bytes: code::MEMORY_BYTES,
            peer_uid: Some(0),
            peer_pid: Some(qemu.child.id() as i32),
        };
        let handshake = handshake::accept(&listener, &expect, DEADLINE).unwrap();
        let id = format!("qemu-{i}");
        let plan = MemoryPlan::flat(dir.join("memory"), Some(zero.clone()));
        supervisor.add_vm(&id, handshake, &plan).unwrap();
        let mut qmp = qemu.qmp();
        qmp.migrate("migrate-incoming", &format!("cat {}/state", dir.display()), true);
        qmp.command("cont", "{}");
        let out = qemu.wait_output(3);
        assert!(!out.contains('X'), "the guest saw a wrong page: {out}");
        // A fault is counted after its answer, and the guest may be through by then.
        let until = Instant::now() + DEADLINE;
        loop {
            let stats = supervisor.vm_stats(&id).unwrap();
            if stats.faults_data >= 31 * 256 {
                break;
            }
            assert!(Instant::now() < until, "31 MiB were written: {stats:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(qemu);
        let gone = events.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(gone, PagerEvent::VmGone { id });
    }
    std::fs::remove_file(&shared).unwrap();
    supervisor.shutdown();
}

#[test]
fn without_a_page_server_qemu_does_not_run() {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let shim = rig::shim();
    let socket = dir.path().join("nobody");
    let mut qemu = Qemu::start(
        dir.path(),
        "memory-backend-memfd,id=mem,size=32M,share=on",
        &["-S"],
        &[
            ("LD_PRELOAD", shim.to_str().unwrap()),
            ("RETHAW_UFFD_SIZE", &code::MEMORY_BYTES.to_string()),
            ("RETHAW_UFFD_SOCKET", socket.to_str().unwrap()),
        ],
    );
    let status = rig::eventually(DEADLINE, || qemu.child.try_wait().unwrap());
    assert_eq!(status.code(), Some(1));
}
