//! Guests on pages of 2 MiB: contents, removal, working set, graduation and a killed page server.
//!
//! Skipped, loudly, where the host cannot reserve any.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

#[path = "rig/huge_pages.rs"]
mod huge_pages;
mod rig;

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rig::fake_vmm::{Answer, Command};
use rig::oracle;
use uffd_handler::bitmap::Bitmap;
use uffd_handler::supervisor::{MemoryPlan, PagerEvent};
use uffd_handler::working_set::WorkingSet;

/// Small pages in a huge one.
const UNIT: u64 = 512;
const UNITS: u64 = 12;
const PAGES: u64 = UNITS * UNIT;

#[test]
fn a_guest_on_huge_pages_is_served_like_any_other() {
    let Some(_reserved) = huge_pages::Reserved::new(UNITS + 2) else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    let mut set = Bitmap::new(PAGES);
    // One small page is enough to want the huge one around it.
    set.set(3 * UNIT + 5);
    set.set(9 * UNIT);
    WorkingSet::from_bitmap(set).save(&dir.join("ws")).unwrap();
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    for (name, ahead, graduates) in [("demand", false, false), ("ahead", true, true)] {
        let mut setup = rig::setup(dir, name, &[4 * UNIT, 8 * UNIT]);
        setup.huge = true;
        let (vmm, handshake) = rig::start(&setup);
        assert_eq!(handshake.regions[0].page_size, 2 << 20);
        let mut plan = MemoryPlan::flat(dir.join("memory"), None);
        plan.working_set = ahead.then(|| dir.join("ws"));
        plan.graduate_after = graduates.then_some(Duration::from_millis(100));
        supervisor.add_vm(name, handshake, &plan).unwrap();
        assert!(supervisor.wait_prefetched(name, rig::DEADLINE).unwrap());
        let mut cpu = vmm.cpu();
        if ahead {
            cpu.read(3 * UNIT + 99);
            let stats = supervisor.vm_stats(name).unwrap();
            assert_eq!((stats.faults(), stats.prefetched), (0, 2 * UNIT), "{stats:?}");
        }
        cpu.run(&Command::Write { page: 17, value: 4 });
        cpu.run(&Command::KernelWrite { page: 5 * UNIT + 1, value: 5 });
        // One that was in place and one that never was.
        cpu.run(&Command::Remove { first: 3 * UNIT, count: UNIT });
        cpu.run(&Command::Remove { first: 6 * UNIT, count: UNIT });
        // The guest goes on when a removal is read, and that is before it is counted.
        let until = Instant::now() + rig::DEADLINE;
        while supervisor.vm_stats(name).unwrap().removes < 2 {
            assert!(Instant::now() < until, "{:?}", supervisor.vm_stats(name));
            std::thread::sleep(Duration::from_millis(1));
        }
        kill(Pid::from_raw(supervisor.pager_pid()), Signal::SIGKILL).unwrap();
        let mut wanted = vec![false; 1 + usize::from(graduates)];
        while wanted.contains(&false) {
            match events.recv_timeout(rig::DEADLINE).unwrap() {
                PagerEvent::PagerRestarted { .. } => wanted[0] = true,
                PagerEvent::Graduated { .. } if graduates => wanted[1] = true,
                PagerEvent::VmGone { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(cpu.run(&Command::Dump { path: dir.join("dump") }), Answer::Done);
        let bytes = std::fs::read(dir.join("dump")).unwrap();
        for (page, found) in bytes.chunks(4096).enumerate() {
            let expected = match page as u64 {
                17 => oracle::written(4),
                p if p == 5 * UNIT + 1 => oracle::written(5),
                p if [3, 6].contains(&(p / UNIT)) => [0; 4096],
                p => oracle::template(7, p),
            };
            assert!(found == expected, "page {page} of {name} is wrong");
        }
        let stats = supervisor.vm_stats(name).unwrap();
        assert_eq!(stats.removes, 2, "{stats:?}");
        drop(vmm);
        supervisor.remove_vm(name);
    }
    supervisor.shutdown();
}
