//! A page server under pressure: a guest that floods it, many guests at once, crashes of its own,
//! and a host on which it cannot be started for a while.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

mod rig;

use std::os::unix::fs::PermissionsExt;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rig::fake_vmm::{Answer, Command, Cpu};
use rig::oracle;
use uffd_handler::supervisor::{MemoryPlan, PagerEvent, Supervisor};

const PAGES: u64 = 4096;

fn all_right(cpu: &mut Cpu) {
    match cpu.answer_within(rig::DEADLINE * 2).expect("it ends") {
        Answer::Storm { wrong, .. } => assert_eq!(wrong, 0, "wrong pages"),
        other => panic!("{other:?}"),
    }
}

/// Memory of its own that a process holds, in KiB.
fn anonymous_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_guest_that_floods_takes_nothing_from_another() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    let supervisor = rig::supervisor(dir);
    let plan = MemoryPlan::flat(dir.join("memory"), None);
    let mut vmms = Vec::new();
    for name in ["flooding", "other"] {
        let (vmm, handshake) = rig::start(&rig::setup(dir, name, &[PAGES]));
        supervisor.add_vm(name, handshake, &plan).unwrap();
        let cpu = vmm.cpu();
        vmms.push((vmm, cpu));
    }
    let flood = Command::Flood { first: 0, count: 64, threads: 8, rounds: 4000 };
    vmms[0].1.send(&flood);
    let mut during = 0;
    rig::eventually(rig::DEADLINE, || {
        during = supervisor.vm_stats("flooding").unwrap().removes;
        (during > 100).then_some(())
    });
    // All of the other's pages come while the flood goes on.
    vmms[1].1.send(&Command::Storm { first: 0, count: PAGES, threads: 2 });
    all_right(&mut vmms[1].1);
    all_right(&mut vmms[0].1);
    let stats = supervisor.vm_stats("flooding").unwrap();
    assert_eq!(stats.removes, 8 * 4000, "{stats:?}");
    // Neither did it harm itself: the rest of its memory is as it was.
    vmms[0].1.send(&Command::Storm { first: 64, count: PAGES - 64, threads: 2 });
    all_right(&mut vmms[0].1);
    drop(vmms);
    supervisor.shutdown();
}

#[test]
fn many_guests_cost_the_page_server_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    let supervisor = rig::supervisor(dir);
    let before = anonymous_kib(supervisor.pager_pid());
    let mut vmms = Vec::new();
    for i in 0..12 {
        let name = format!("vm{i}");
        let (vmm, handshake) = rig::start(&rig::setup(dir, &name, &[PAGES]));
        let mut plan = MemoryPlan::flat(dir.join("memory"), None);
        plan.graduate_after = (i % 3 == 0).then_some(std::time::Duration::ZERO);
        supervisor.add_vm(&name, handshake, &plan).unwrap();
        let mut cpu = vmm.cpu();
        cpu.send(&Command::Storm { first: 0, count: PAGES, threads: 2 });
        vmms.push((vmm, cpu));
    }
    vmms.iter_mut().for_each(|(_, cpu)| all_right(cpu));
    // They hold 192 MiB. What a page server has per VM is stacks and at most one buffer of 2 MiB.
    let kib = anonymous_kib(supervisor.pager_pid()) - before;
    println!("{kib} KiB for 12 VMs");
    assert!(kib < 12 * 3 * 1024, "{kib} KiB");
    drop(vmms);
    supervisor.shutdown();
}

fn restarted(events: &std::sync::mpsc::Receiver<PagerEvent>) {
    match events.recv_timeout(rig::DEADLINE).unwrap() {
        PagerEvent::PagerRestarted { vms: 1, .. } => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_page_server_that_crashes_is_replaced_like_one_that_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    let (vmm, handshake) = rig::start(&rig::setup(dir, "vm", &[PAGES]));
    supervisor.add_vm("vm", handshake, &MemoryPlan::flat(dir.join("memory"), None)).unwrap();
    let mut cpu = vmm.cpu();
    cpu.send(&Command::Storm { first: 0, count: PAGES, threads: 2 });
    // A panic ends in SIGABRT. (A SIGSEGV sent from outside is taken for a stack overflow that was
    // none, once.)
    for signal in [Signal::SIGABRT, Signal::SIGILL, Signal::SIGABRT] {
        kill(Pid::from_raw(supervisor.pager_pid()), signal).unwrap();
        restarted(&events);
    }
    all_right(&mut cpu);
    drop(vmm);
    supervisor.shutdown();
}

#[test]
fn guests_wait_for_as_long_as_no_page_server_can_be_started() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    let mut config = rig::config(dir);
    let (wrapper, broken) = (dir.join("pager"), dir.join("broken"));
    let script = format!(
        "#!/bin/sh\n[ -e {} ] && exit 1\nexec {} \"$@\"\n",
        broken.display(),
        config.binary.display()
    );
    std::fs::write(&wrapper, script).unwrap();
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755)).unwrap();
    config.binary = wrapper;
    let supervisor = Supervisor::start(config).unwrap();
    let events = supervisor.events();
    let (vmm, handshake) = rig::start(&rig::setup(dir, "vm", &[PAGES]));
    supervisor.add_vm("vm", handshake, &MemoryPlan::flat(dir.join("memory"), None)).unwrap();
    let mut cpu = vmm.cpu();
    cpu.read(1);
    std::fs::write(&broken, "").unwrap();
    kill(Pid::from_raw(supervisor.pager_pid()), Signal::SIGKILL).unwrap();
    cpu.send(&Command::Storm { first: 0, count: PAGES, threads: 2 });
    let event = events.recv_timeout(rig::DEADLINE).unwrap();
    assert!(matches!(event, PagerEvent::PagerUnavailable { .. }), "{event:?}");
    std::fs::remove_file(&broken).unwrap();
    rig::eventually(rig::DEADLINE, || match events.try_recv() {
        Ok(PagerEvent::PagerRestarted { .. }) => Some(()),
        _ => None,
    });
    all_right(&mut cpu);
    drop(vmm);
    supervisor.shutdown();
}
