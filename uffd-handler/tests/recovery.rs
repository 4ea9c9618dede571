//! Service and page server killed together, or a page server that a new service cannot talk to: the
//! next service takes the VMs out of their VMMs.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

mod rig;

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{SockFlag, accept4};
use nix::unistd::Pid;
use rig::fake_vmm::{Answer, Command};
use rig::oracle;
use uffd_handler::control::{self, Channel, FromPager, Reply, Request, ToPager};
use uffd_handler::fdpass;
use uffd_handler::supervisor::{MemoryPlan, PagerEvent, Supervisor, SupervisorConfig};

const SERVICE: &str = "RETHAW_TEST_SERVICE";
const NAME: &str = "vms_outlive_the_death_of_both_or_are_reported";
const PAGES: u64 = 2048;
const OLD_PAGER: &str = "RETHAW_TEST_OLD_PAGER";
const OLD_NAME: &str = "a_page_server_of_another_version_is_replaced";

fn config(dir: &Path) -> SupervisorConfig {
    let mut config = rig::config(dir);
    config.state_dir = Some(dir.join("state"));
    config
}

/// A service that takes three VMs and waits to be killed.
fn service(dir: &Path) -> ! {
    let supervisor = Supervisor::start(config(dir)).unwrap();
    let mut vmms = Vec::new();
    for name in ["kept", "spoiled", "ended"] {
        oracle::write_memory(&dir.join(format!("{name}.memory")), 7, PAGES);
        let (vmm, handshake) = rig::start(&rig::setup(dir, name, &[PAGES]));
        let plan = MemoryPlan::flat(dir.join(format!("{name}.memory")), None);
        supervisor.add_vm(name, handshake, &plan).unwrap();
        vmms.push(vmm);
    }
    let pids: Vec<String> = vmms.iter().map(|vmm| vmm.pid().to_string()).collect();
    println!("serving {} {}", supervisor.pager_pid(), pids.join(" "));
    std::thread::sleep(Duration::from_secs(120));
    std::process::exit(1);
}

fn start_service(dir: &Path) -> (Child, Vec<Pid>) {
    rig::start_process(NAME, SERVICE, dir)
}

#[test]
fn vms_outlive_the_death_of_both_or_are_reported() {
    if let Ok(dir) = std::env::var(SERVICE) {
        service(Path::new(&dir));
    }
    // The state belongs in memory, as in production.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let dir = dir.path();
    let (mut first, pids) = start_service(dir);
    let mut kept = rig::fake_vmm::connect(&dir.join("kept.commands"));
    kept.run(&Command::Storm { first: 0, count: 512, threads: 1 });
    kept.run(&Command::Write { page: 3, value: 9 });
    kept.run(&Command::Remove { first: 20, count: 4 });
    first.kill().unwrap();
    kill(pids[0], Signal::SIGKILL).unwrap();
    kill(pids[3], Signal::SIGKILL).unwrap();
    first.wait().unwrap();
    // A guest that asks now waits, and nothing is made up for it.
    kept.send(&Command::Read { page: 1000 });
    assert_eq!(kept.answer_within(Duration::from_millis(100)), None);
    oracle::write_memory(&dir.join("spoiled.memory"), 8, PAGES);

    let second = rig::eventually(rig::DEADLINE, || Supervisor::start(config(dir)).ok());
    assert_eq!(second.adopted(), ["kept"]);
    let expected = crc32fast::hash(&oracle::template(7, 1000));
    let answer = kept.answer_within(rig::DEADLINE);
    assert!(matches!(answer, Some(Answer::Page { crc, .. }) if crc == expected), "{answer:?}");
    for page in [20, 23] {
        assert_eq!(kept.read(page), crc32fast::hash(&[0; 4096]), "given back before");
    }
    assert_eq!(kept.read(3), crc32fast::hash(&oracle::written(9)));
    assert!(second.vm_stats("kept").unwrap().faults() >= 512, "its counts are kept too");
    // The memory file of this one is another now, and that one's VMM has ended.
    let lost: Vec<String> = second.lost_at_start().into_iter().map(|(id, _)| id).collect();
    assert_eq!(lost, ["spoiled"]);

    // Its process handle stands in for the handshake socket.
    let events = second.events();
    kill(pids[1], Signal::SIGKILL).unwrap();
    // What was lost at the start may be told late, too.
    let gone = PagerEvent::VmGone { id: "kept".into() };
    while events.recv_timeout(rig::DEADLINE).unwrap() != gone {}
    assert_eq!(std::fs::read_dir(dir.join("state")).unwrap().count(), 0);
    kill(pids[2], Signal::SIGKILL).unwrap();
    second.shutdown();
}

/// A page server as an older release would be: it greets with its own version, and that is all that
/// a service of today can ask of it.
fn old_pager(dir: &Path) -> ! {
    let listener = control::listen(&rig::config(dir).socket).unwrap();
    println!("serving {}", std::process::id());
    let deadline = Instant::now() + Duration::from_secs(60);
    assert_eq!(fdpass::wait_for(listener.as_fd(), PollFlags::POLLIN, deadline), Ok(true));
    let client = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
    // SAFETY: accept4 has just made this descriptor for us.
    let channel = Channel::new(unsafe { OwnedFd::from_raw_fd(client) });
    let (ToPager { number, request }, _) = channel.receive(deadline).unwrap();
    assert!(matches!(request, Request::Hello { .. }), "{request:?}");
    let reply = Reply::Hello { version: 1, pid: std::process::id() as i32 };
    channel.send(&FromPager::Reply { number, reply }, &[]).unwrap();
    std::thread::sleep(Duration::from_secs(60));
    std::process::exit(1);
}

#[test]
fn a_page_server_of_another_version_is_replaced() {
    if let Ok(dir) = std::env::var(OLD_PAGER) {
        old_pager(Path::new(&dir));
    }
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let dir = dir.path();
    let (mut first, pids) = start_service(dir);
    let mut kept = rig::fake_vmm::connect(&dir.join("kept.commands"));
    kept.run(&Command::Write { page: 3, value: 9 });
    first.kill().unwrap();
    kill(pids[0], Signal::SIGKILL).unwrap();
    first.wait().unwrap();
    let (mut old, _) = rig::start_process(OLD_NAME, OLD_PAGER, dir);

    // The killed one may hold its lock for another moment.
    let second = rig::eventually(rig::DEADLINE, || Supervisor::start(config(dir)).ok());
    let ended = old.wait().unwrap();
    assert_eq!(ended.signal(), Some(Signal::SIGKILL as i32), "{ended}");
    assert!(second.adopted().contains(&"kept".to_owned()));
    assert_eq!(kept.read(1000), crc32fast::hash(&oracle::template(7, 1000)));
    assert_eq!(kept.read(3), crc32fast::hash(&oracle::written(9)));
    for vmm in &pids[1..] {
        kill(*vmm, Signal::SIGKILL).unwrap();
    }
    second.shutdown();
}
