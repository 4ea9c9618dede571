//! Random interleavings of touching, writing, giving back, filling ahead and killing the page
//! server, against an oracle that knows every byte.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

mod rig;

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rig::fake_vmm::{Command, Cpu};
use rig::oracle;
use uffd_handler::bitmap::Bitmap;
use uffd_handler::source::ZeroMap;
use uffd_handler::supervisor::{MemoryPlan, PagerEvent, Supervisor};
use uffd_handler::working_set::WorkingSet;

/// Pages of each virtual CPU; only it touches them.
const SHARE: u64 = 60;
const CPUS: u64 = 3;
const PAGES: u64 = SHARE * CPUS;
/// A boundary in the middle of a share.
const REGIONS: [u64; 2] = [100, 80];

#[derive(Clone, Debug)]
enum Op {
    Read(u64),
    Write(u64, u64),
    KernelWrite(u64, u64),
    Remove(u64, u64),
}

#[derive(Clone, Debug)]
struct Case {
    ops: Vec<Vec<Op>>,
    kill_after_millis: Vec<u64>,
    working_set: Vec<u64>,
    graduate_after_millis: Option<u64>,
    shared: bool,
    zero_map: bool,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..SHARE).prop_map(Op::Read),
        2 => (0..SHARE, any::<u64>()).prop_map(|(page, value)| Op::Write(page, value)),
        1 => (0..SHARE, any::<u64>()).prop_map(|(page, value)| Op::KernelWrite(page, value)),
        2 => (0..SHARE, 1..12_u64).prop_map(|(page, count)| Op::Remove(page, count)),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    (
        proptest::collection::vec(proptest::collection::vec(op(), 0..80), CPUS as usize),
        proptest::collection::vec(0..25_u64, 0..3),
        proptest::collection::vec(0..PAGES, 0..100),
        proptest::option::of(0..20_u64),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(
            |(ops, kill_after_millis, working_set, graduate_after_millis, shared, zero_map)| Case {
                ops,
                kill_after_millis,
                working_set,
                graduate_after_millis,
                shared,
                zero_map,
            },
        )
}

/// Runs one virtual CPU's part and returns what its pages must hold.
fn run_cpu(cpu: &mut Cpu, first: u64, ops: &[Op]) -> Vec<[u8; 4096]> {
    let mut pages: Vec<[u8; 4096]> =
        (first..first + SHARE).map(|page| oracle::template(7, page)).collect();
    for op in ops {
        match *op {
            Op::Read(at) => {
                let expected = crc32fast::hash(&pages[at as usize]);
                assert_eq!(cpu.read(first + at), expected, "page {} in {op:?}", first + at);
            }
            Op::Write(at, value) => {
                cpu.run(&Command::Write { page: first + at, value });
                pages[at as usize] = oracle::written(value);
            }
            Op::KernelWrite(at, value) => {
                cpu.run(&Command::KernelWrite { page: first + at, value });
                pages[at as usize] = oracle::written(value);
            }
            Op::Remove(at, count) => {
                // Within the share and on one side of the region boundary.
                let start = first + at;
                let limit = if start < REGIONS[0] { REGIONS[0] } else { PAGES };
                let end = (start + count).min(limit).min(first + SHARE);
                cpu.run(&Command::Remove { first: start, count: end - start });
                pages[at as usize..(end - first) as usize].fill([0; 4096]);
            }
        }
    }
    pages
}

fn check(dir: &Path, supervisor: &Supervisor, number: u32, case: &Case) {
    let id = format!("vm{number}");
    let mut setup = rig::setup(dir, &id, &REGIONS);
    setup.shared = case.shared;
    let (vmm, handshake) = rig::start(&setup);
    let zero_map = case.zero_map.then(|| dir.join("zero"));
    let mut plan = MemoryPlan::flat(dir.join("memory"), zero_map);
    plan.graduate_after = case.graduate_after_millis.map(Duration::from_millis);
    if !case.working_set.is_empty() {
        let mut set = Bitmap::new(PAGES);
        case.working_set.iter().for_each(|page| set.set(*page));
        let path = dir.join(format!("ws{number}"));
        WorkingSet::from_bitmap(set).save(&path).unwrap();
        plan.working_set = Some(path);
    }
    supervisor.add_vm(&id, handshake, &plan).unwrap();
    let pages: Vec<[u8; 4096]> = std::thread::scope(|scope| {
        scope.spawn(|| {
            let events = supervisor.events();
            for millis in &case.kill_after_millis {
                std::thread::sleep(Duration::from_millis(*millis));
                let pager = supervisor.pager_pid();
                assert!(pager > 0, "zero would be this process group");
                kill(Pid::from_raw(pager), Signal::SIGKILL).unwrap();
                loop {
                    match events.recv_timeout(rig::DEADLINE).unwrap() {
                        PagerEvent::PagerRestarted { .. } => break,
                        PagerEvent::Graduated { .. } => {}
                        other => panic!("{other:?}"),
                    }
                }
            }
        });
        let cpus: Vec<_> = case
            .ops
            .iter()
            .enumerate()
            .map(|(i, ops)| {
                let mut cpu = vmm.cpu();
                scope.spawn(move || run_cpu(&mut cpu, i as u64 * SHARE, ops))
            })
            .collect();
        cpus.into_iter().flat_map(|cpu| cpu.join().unwrap()).collect()
    });
    let dump = dir.join("dump");
    vmm.cpu().run(&Command::Dump { path: dump.clone() });
    let bytes = std::fs::read(dump).unwrap();
    for (page, (found, expected)) in bytes.chunks(4096).zip(&pages).enumerate() {
        assert!(found == expected, "page {page} is wrong in the end");
    }
    drop(vmm);
    supervisor.remove_vm(&id);
}

#[test]
fn no_interleaving_shows_a_guest_a_wrong_byte() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    ZeroMap::scan(&dir.join("memory")).unwrap().save(&dir.join("zero")).unwrap();
    let supervisor = rig::supervisor(dir);
    let mut config = Config::with_cases(40);
    // Each step of a shrink starts processes; the case itself says enough.
    config.max_shrink_iters = 30;
    config.failure_persistence = None;
    let number = std::cell::Cell::new(0);
    let outcome = TestRunner::new(config).run(&case(), |case| {
        number.set(number.get() + 1);
        check(dir, &supervisor, number.get(), &case);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
    let stats = supervisor.stats();
    println!("{} cases, {stats:?}", number.get());
    assert!(stats.takeovers > 10 && stats.removes > 100 && stats.filled > 0, "{stats:?}");
    supervisor.shutdown();
}
