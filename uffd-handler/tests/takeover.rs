//! Page server, service or VM killed: what every guest sees, and how long it waits.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

mod rig;

use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rig::fake_vmm::{Answer, Command};
use rig::oracle;
use uffd_handler::supervisor::{MemoryPlan, PagerEvent, Supervisor};

const SERVICE: &str = "RETHAW_TEST_SERVICE";
const PAGES: u64 = 8192;

fn kill_pager(pid: i32) {
    assert!(pid > 0, "zero would be this process group");
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// Waits on page faults under a storm, in milliseconds: 99th percentile and longest.
fn storm_waits(answer: Answer) -> (f64, f64) {
    let Answer::Storm { wrong, mut waits_nanos } = answer else { panic!("{answer:?}") };
    assert_eq!(wrong, 0, "pages were wrong");
    waits_nanos.sort_unstable();
    let millis = |nanos: u64| nanos as f64 / 1e6;
    (millis(waits_nanos[waits_nanos.len() * 99 / 100]), millis(waits_nanos[waits_nanos.len() - 1]))
}

#[test]
fn killing_the_page_server_under_load_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    let mut vmms = Vec::new();
    for i in 0..3 {
        let name = format!("vm{i}");
        let mut setup = rig::setup(dir, &name, &[PAGES / 4, PAGES * 3 / 4]);
        setup.shared = i == 1;
        let (vmm, handshake) = rig::start(&setup);
        let plan = MemoryPlan::flat(dir.join("memory"), None);
        supervisor.add_vm(&name, handshake, &plan).unwrap();
        let mut cpu = vmm.cpu();
        cpu.send(&Command::Storm { first: 0, count: PAGES, threads: 4 });
        vmms.push((vmm, cpu));
    }
    let mut kills = 0;
    let mut longest_takeover = 0;
    while kills < 4 {
        std::thread::sleep(Duration::from_millis(60));
        kill_pager(supervisor.pager_pid());
        match events.recv_timeout(rig::DEADLINE).unwrap() {
            PagerEvent::PagerRestarted { pid, vms, millis } => {
                assert_eq!((pid, vms), (supervisor.pager_pid(), 3));
                longest_takeover = longest_takeover.max(millis);
            }
            other => panic!("{other:?}"),
        }
        kills += 1;
    }
    for (_, cpu) in &mut vmms {
        let answer = cpu.answer_within(rig::DEADLINE).expect("the storm ends");
        let (p99, longest) = storm_waits(answer);
        println!(
            "fault wait p99 {p99:.2} ms, longest {longest:.1} ms, takeover {longest_takeover} ms"
        );
        // A hang guard only: the machine may be busy with anything.
        assert!(longest < 10_000.0);
    }
    assert_eq!(supervisor.restarts(), 4);
    assert!(supervisor.stats().takeovers >= 12);
    drop(vmms);
    supervisor.shutdown();
}

#[test]
fn a_silent_page_server_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, 64);
    let mut config = rig::config(dir);
    config.heartbeat = Duration::from_millis(100);
    let supervisor = Supervisor::start(config).unwrap();
    let events = supervisor.events();
    let (vmm, handshake) = rig::start(&rig::setup(dir, "vm", &[64]));
    let plan = MemoryPlan::flat(dir.join("memory"), None);
    supervisor.add_vm("vm", handshake, &plan).unwrap();
    let mut cpu = vmm.cpu();
    cpu.read(1);
    kill(Pid::from_raw(supervisor.pager_pid()), Signal::SIGSTOP).unwrap();
    assert_eq!(cpu.read(2), crc32fast::hash(&oracle::template(7, 2)));
    let event = events.recv_timeout(rig::DEADLINE).unwrap();
    assert!(matches!(event, PagerEvent::PagerRestarted { vms: 1, .. }), "{event:?}");
    drop(vmm);
    supervisor.shutdown();
}

#[test]
fn what_was_given_back_stays_zeros_after_a_takeover() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, 64);
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    let (vmm, handshake) = rig::start(&rig::setup(dir, "vm", &[64]));
    let plan = MemoryPlan::flat(dir.join("memory"), None);
    supervisor.add_vm("vm", handshake, &plan).unwrap();
    let mut cpu = vmm.cpu();
    cpu.read(4);
    cpu.run(&Command::Remove { first: 4, count: 2 });
    kill_pager(supervisor.pager_pid());
    assert!(matches!(
        events.recv_timeout(rig::DEADLINE).unwrap(),
        PagerEvent::PagerRestarted { .. }
    ));
    for page in [4, 5] {
        assert_eq!(cpu.read(page), crc32fast::hash(&[0; 4096]), "page {page}");
    }
    assert_eq!(cpu.read(6), crc32fast::hash(&oracle::template(7, 6)));
    drop(vmm);
    supervisor.shutdown();
}

/// Runs as a service of its own when told to: takes one VM, says so, and waits to be killed.
fn service(dir: &Path) -> ! {
    let supervisor = rig::supervisor(dir);
    let (vmm, handshake) = rig::start(&rig::setup(dir, "vm", &[PAGES]));
    let plan = MemoryPlan::flat(dir.join("memory"), None);
    supervisor.add_vm("vm", handshake, &plan).unwrap();
    println!("serving {} {}", supervisor.pager_pid(), vmm.pid());
    std::thread::sleep(Duration::from_secs(120));
    std::process::exit(1);
}

#[test]
fn a_killed_service_leaves_its_vms_served_and_the_next_one_takes_them_back() {
    if let Ok(dir) = std::env::var(SERVICE) {
        service(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    let name = "a_killed_service_leaves_its_vms_served_and_the_next_one_takes_them_back";
    let (mut first, pids) = rig::start_process(name, SERVICE, dir);
    first.kill().unwrap();
    first.wait().unwrap();
    // Nobody but the page server is left, and it serves on.
    let mut cpu = rig::fake_vmm::connect(&dir.join("vm.commands"));
    cpu.run(&Command::Storm { first: 0, count: PAGES / 2, threads: 2 });
    cpu.run(&Command::Remove { first: 10, count: 1 });

    let second = rig::supervisor(dir);
    let events = second.events();
    assert_eq!(second.adopted(), ["vm"]);
    assert_eq!(second.pager_pid(), pids[0].as_raw(), "the same page server");
    assert!(second.vm_stats("vm").unwrap().faults() >= PAGES / 2);
    // What was taken back is enough for a takeover.
    kill_pager(second.pager_pid());
    assert!(matches!(
        events.recv_timeout(rig::DEADLINE).unwrap(),
        PagerEvent::PagerRestarted { vms: 1, .. }
    ));
    let storm = Command::Storm { first: PAGES / 2, count: PAGES / 2, threads: 2 };
    storm_waits(cpu.run(&storm));
    assert_eq!(cpu.read(10), crc32fast::hash(&[0; 4096]));
    kill(pids[1], Signal::SIGKILL).unwrap();
    assert_eq!(events.recv_timeout(rig::DEADLINE).unwrap(), PagerEvent::VmGone { id: "vm".into() });
    second.shutdown();
}

#[test]
fn a_vm_that_ends_together_with_the_service_does_not_end_the_page_server() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, 64);
    for round in 0..20 {
        let supervisor = rig::supervisor(dir);
        let pager = supervisor.pager_pid();
        let names = [format!("ends{round}"), format!("stays{round}")];
        let [(mut ends, _), (stays, mut cpu)] = names.each_ref().map(|name| {
            let (vmm, handshake) = rig::start(&rig::setup(dir, name, &[64]));
            let plan = MemoryPlan::flat(dir.join("memory"), None);
            supervisor.add_vm(name, handshake, &plan).unwrap();
            let cpu = vmm.cpu();
            (vmm, cpu)
        });
        // The page server sees both at once, or one right after the other.
        kill(Pid::from_raw(pager), Signal::SIGSTOP).unwrap();
        ends.kill();
        drop(supervisor);
        kill(Pid::from_raw(pager), Signal::SIGCONT).unwrap();
        assert_eq!(cpu.read(2), crc32fast::hash(&oracle::template(7, 2)));
        let next = rig::supervisor(dir);
        assert_eq!(next.pager_pid(), pager, "the same page server");
        drop(stays);
        rig::eventually(rig::DEADLINE, || next.vms().is_empty().then_some(()));
    }
    rig::supervisor(dir).shutdown();
}

#[test]
fn a_killed_vm_frees_everything() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    let fds = |pid: i32| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let threads = |pid: i32| std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
    let pager = supervisor.pager_pid();
    let before = (fds(pager), threads(pager), std::fs::read_dir("/proc/self/fd").unwrap().count());
    for i in 0..4 {
        let name = format!("vm{i}");
        let (mut vmm, handshake) = rig::start(&rig::setup(dir, &name, &[PAGES]));
        let mut plan = MemoryPlan::flat(dir.join("memory"), None);
        // Killed while idle, under load, and while being filled.
        plan.graduate_after = (i == 2).then_some(Duration::ZERO);
        supervisor.add_vm(&name, handshake, &plan).unwrap();
        let mut cpu = vmm.cpu();
        if i > 0 {
            cpu.send(&Command::Storm { first: 0, count: PAGES, threads: 4 });
            std::thread::sleep(Duration::from_millis(20));
        }
        let killed = Instant::now();
        vmm.kill();
        assert_eq!(events.recv_timeout(rig::DEADLINE).unwrap(), PagerEvent::VmGone { id: name });
        println!("noticed after {:?}", killed.elapsed());
    }
    assert!(supervisor.vms().is_empty());
    rig::eventually(rig::DEADLINE, || {
        let mine = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let now = (fds(pager), threads(pager), mine);
        // Other tests of this process open descriptors too: the page server's count is exact.
        (now.0 == before.0 && now.1 == before.1).then_some(())
    });
    supervisor.shutdown();
}

#[test]
fn a_page_server_alone_goes_by_itself_and_two_do_not_share_a_socket() {
    let dir = tempfile::tempdir().unwrap();
    let supervisor = rig::supervisor(dir.path());
    let pid = supervisor.pager_pid();
    let second = Process::new(env!("CARGO_BIN_EXE_rethaw-pager"))
        .arg("--socket")
        .arg(dir.path().join("pager.sock"))
        .args(["--log-level", "off"])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(second.code(), Some(1));
    // Dropping is not ending: it waits for the next service for its idle time.
    drop(supervisor);
    let gone = || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.contains(") Z ").then_some(()),
        Err(_) => Some(()),
    };
    assert_eq!(gone(), None);
    rig::eventually(rig::DEADLINE, gone);
}
