//! Memory files that are slow, fail, or change under the page server: a VM is served right or not
//! at all, and never at the cost of another.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

mod rig;
#[path = "rig/slow_fs.rs"]
mod slow_fs;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use rig::fake_vmm::{Answer, Command, Cpu};
use rig::oracle;
use uffd_handler::source::{DeltaWriter, LayerFiles};
use uffd_handler::supervisor::{AddVmError, MemoryPlan, PagerEvent};

const PAGES: u64 = 256;

/// The VM is reported lost, and the virtual CPU that asked still waits.
fn assert_lost(events: &Receiver<PagerEvent>, cpu: &mut Cpu, reason_has: &str) {
    match events.recv_timeout(rig::DEADLINE).unwrap() {
        PagerEvent::VmLost { reason, .. } => assert!(reason.contains(reason_has), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(cpu.answer_within(Duration::from_millis(100)), None, "nothing was made up");
}

fn read_later(cpu: &mut Cpu, page: u64) {
    cpu.send(&Command::Read { page });
}

#[test]
fn a_memory_file_that_changes_loses_the_vm_and_a_renamed_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    type Harm = fn(&Path);
    let cases: [(&str, Harm); 3] = [
        ("cut", |path| OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap()),
        ("rewritten", |path| {
            let file = OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(&[0xEE; 4096], 9 * 4096).unwrap();
        }),
        ("renamed", |path| {
            let other = path.with_extension("other");
            oracle::write_memory(&other, 8, PAGES);
            std::fs::rename(other, path).unwrap();
        }),
    ];
    for (name, harm) in cases {
        let memory = dir.join(format!("{name}.memory"));
        oracle::write_memory(&memory, 7, PAGES);
        let (vmm, handshake) = rig::start(&rig::setup(dir, name, &[PAGES]));
        supervisor.add_vm(name, handshake, &MemoryPlan::flat(&memory, None)).unwrap();
        let mut cpu = vmm.cpu();
        cpu.read(8);
        // File times tick only every few milliseconds.
        std::thread::sleep(Duration::from_millis(20));
        harm(&memory);
        if name == "renamed" {
            assert_eq!(cpu.read(9), crc32fast::hash(&oracle::template(7, 9)));
        } else {
            read_later(&mut cpu, 9);
            assert_lost(&events, &mut cpu, "changed while in use");
        }
        supervisor.remove_vm(name);
    }
    supervisor.shutdown();
}

#[test]
fn files_of_the_wrong_size_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("short"), 7, PAGES - 1);
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    let index = (dir.join("d"), dir.join("d.idx"));
    DeltaWriter::create(&index.0, &index.1, PAGES + 1).unwrap().finish().unwrap();
    let supervisor = rig::supervisor(dir);
    let flat = |name: &str| LayerFiles::Flat { memory: dir.join(name), zero_map: None };
    let delta = LayerFiles::Delta { data: index.0.clone(), index: index.1.clone() };
    let chains = [
        vec![flat("short")],
        vec![flat("memory"), delta.clone()],
        vec![delta],
        vec![flat("memory"), flat("memory")],
        vec![],
    ];
    for (i, layers) in chains.into_iter().enumerate() {
        let (_vmm, handshake) = rig::start(&rig::setup(dir, &format!("vm{i}"), &[PAGES]));
        let plan = MemoryPlan { layers, ..MemoryPlan::default() };
        let outcome = supervisor.add_vm("vm", handshake, &plan);
        assert!(matches!(outcome, Err(AddVmError::Refused { .. })), "{i}: {outcome:?}");
    }
    assert!(supervisor.vms().is_empty());
    let (_vmm, handshake) = rig::start(&rig::setup(dir, "none", &[PAGES]));
    let outcome = supervisor.add_vm("vm", handshake, &MemoryPlan::flat(dir.join("no"), None));
    assert!(matches!(outcome, Err(AddVmError::Plan(_))), "{outcome:?}");
    supervisor.shutdown();
}

#[test]
fn a_damaged_delta_page_loses_the_vm() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    let (data, index) = (dir.join("d"), dir.join("d.idx"));
    let mut writer = DeltaWriter::create(&data, &index, PAGES).unwrap();
    writer.page(3, &oracle::written(1)).unwrap();
    writer.page(5, &oracle::written(2)).unwrap();
    writer.finish().unwrap();
    let file = OpenOptions::new().write(true).open(&data).unwrap();
    file.write_all_at(&[1], 4096 + 77).unwrap();
    drop(file);
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    let (vmm, handshake) = rig::start(&rig::setup(dir, "vm", &[PAGES]));
    let mut plan = MemoryPlan::flat(dir.join("memory"), None);
    plan.layers.push(LayerFiles::Delta { data, index });
    supervisor.add_vm("vm", handshake, &plan).unwrap();
    let mut cpu = vmm.cpu();
    assert_eq!(cpu.read(3), crc32fast::hash(&oracle::written(1)));
    read_later(&mut cpu, 5);
    assert_lost(&events, &mut cpu, "damaged");
    // A lost VM is still there for the next service to hear of, but not handed to a new pager.
    supervisor.replace_pager();
    assert!(matches!(
        events.recv_timeout(rig::DEADLINE).unwrap(),
        PagerEvent::PagerRestarted { vms: 0, .. }
    ));
    drop(vmm);
    supervisor.remove_vm("vm");
    supervisor.shutdown();
}

#[test]
fn failing_reads_are_retried_and_then_given_up_and_slow_ones_delay_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mounted = dir.join("fs");
    std::fs::create_dir(&mounted).unwrap();
    if File::open("/dev/fuse").is_err() {
        eprintln!("SKIPPED: no /dev/fuse");
        return;
    }
    let (session, trouble) = slow_fs::mount(&mounted, 7, PAGES);
    oracle::write_memory(&dir.join("memory"), 7, 4096);
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    let (slow_vmm, handshake) = rig::start(&rig::setup(dir, "slow", &[PAGES]));
    let plan = MemoryPlan::flat(mounted.join("memory"), None);
    supervisor.add_vm("slow", handshake, &plan).unwrap();
    let mut slow = slow_vmm.cpu();

    // Far apart, so that read-ahead of one does not bring the next.
    trouble.errors.store(2, Ordering::Relaxed);
    assert_eq!(slow.read(1), crc32fast::hash(&oracle::template(7, 1)));
    assert!(supervisor.vm_stats("slow").unwrap().source_retries >= 1);

    let (fast_vmm, handshake) = rig::start(&rig::setup(dir, "fast", &[4096]));
    let plan = MemoryPlan::flat(dir.join("memory"), None);
    supervisor.add_vm("fast", handshake, &plan).unwrap();
    trouble.millis.store(1500, Ordering::Relaxed);
    read_later(&mut slow, 200);
    let storm = Command::Storm { first: 0, count: 4096, threads: 4 };
    let Answer::Storm { wrong, waits_nanos } = fast_vmm.cpu().run(&storm) else { panic!() };
    assert_eq!(wrong, 0);
    let longest = waits_nanos.iter().max().unwrap() / 1_000_000;
    println!("longest wait of another VM while one waits for its disk: {longest} ms");
    assert!(longest < 1000, "{longest} ms");
    let answer = slow.answer_within(rig::DEADLINE);
    assert!(matches!(answer, Some(Answer::Page { crc, .. })
        if crc == crc32fast::hash(&oracle::template(7, 200))));

    trouble.millis.store(0, Ordering::Relaxed);
    trouble.errors.store(u32::MAX, Ordering::Relaxed);
    read_later(&mut slow, 100);
    assert_lost(&events, &mut slow, "page 100");
    drop((slow_vmm, fast_vmm));
    supervisor.remove_vm("slow");
    supervisor.remove_vm("fast");
    supervisor.shutdown();
    drop(session);
}
