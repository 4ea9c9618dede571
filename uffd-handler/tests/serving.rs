//! Demand faults, zeros, working sets, deltas and graduation, with a real page server.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

mod rig;

use std::time::Duration;

use rig::fake_vmm::{Answer, Command};
use rig::oracle;
use uffd_handler::bitmap::Bitmap;
use uffd_handler::source::{DeltaWriter, LayerFiles, ZeroMap};
use uffd_handler::supervisor::{MemoryPlan, PagerEvent};
use uffd_handler::working_set::WorkingSet;

/// Every page of a memory, compared to what it should be.
fn compare(dump: &std::path::Path, expected: impl Fn(u64) -> [u8; 4096]) {
    let bytes = std::fs::read(dump).unwrap();
    for (page, found) in bytes.chunks(4096).enumerate() {
        assert!(found == expected(page as u64), "page {page} is wrong");
    }
}

#[test]
fn every_byte_is_right_for_both_kinds_of_memory() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, 300);
    ZeroMap::scan(&dir.join("memory")).unwrap().save(&dir.join("zero")).unwrap();
    let supervisor = rig::supervisor(dir);
    for (name, shared, zero_map) in [("private", false, true), ("shared", true, false)] {
        let mut setup = rig::setup(dir, name, &[100, 200]);
        setup.shared = shared;
        let (vmm, handshake) = rig::start(&setup);
        let zero = zero_map.then(|| dir.join("zero"));
        let plan = MemoryPlan::flat(dir.join("memory"), zero);
        supervisor.add_vm(name, handshake, &plan).unwrap();
        let mut cpu = vmm.cpu();
        cpu.run(&Command::Write { page: 5, value: 1 });
        cpu.run(&Command::KernelWrite { page: 103, value: 2 });
        assert_eq!(cpu.read(107), crc32fast::hash(&[0; 4096]));
        cpu.run(&Command::Write { page: 107, value: 3 });
        cpu.run(&Command::Remove { first: 110, count: 3 });
        cpu.read(120);
        cpu.run(&Command::Remove { first: 120, count: 1 });
        cpu.run(&Command::Dump { path: dir.join("dump") });
        compare(&dir.join("dump"), |page| match page {
            5 => oracle::written(1),
            103 => oracle::written(2),
            107 => oracle::written(3),
            110..=112 | 120 => [0; 4096],
            page => oracle::template(7, page),
        });
        let stats = supervisor.vm_stats(name).unwrap();
        assert_eq!(stats.removes, 2, "{stats:?}");
        assert!(stats.faults_removed >= 4, "{stats:?}");
        assert_eq!(stats.faults_zero > 70, zero_map, "{stats:?}");
        assert_eq!(stats.latency_buckets.iter().sum::<u64>(), stats.faults());
        supervisor.remove_vm(name);
    }
    assert!(supervisor.stats().faults() > 500, "counts of ended VMs are kept");
    supervisor.shutdown();
}

#[test]
fn a_recorded_working_set_spares_the_next_clone_its_faults() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, 2000);
    ZeroMap::scan(&dir.join("memory")).unwrap().save(&dir.join("zero")).unwrap();
    let supervisor = rig::supervisor(dir);
    let wanted: Vec<u64> = (0..400).map(|i| i * 5 % 2000).collect();
    let mut plan = MemoryPlan::flat(dir.join("memory"), Some(dir.join("zero")));
    plan.record = true;
    let (first, handshake) = rig::start(&rig::setup(dir, "first", &[2000]));
    supervisor.add_vm("first", handshake, &plan).unwrap();
    let mut cpu = first.cpu();
    for page in &wanted {
        cpu.read(*page);
    }
    let set = supervisor.recording("first").unwrap();
    assert_eq!(set.len_pages(), 400);
    cpu.read(1);
    assert_eq!(supervisor.recording("first").unwrap().len_pages(), 400, "recording has ended");
    set.save(&dir.join("ws")).unwrap();

    plan.record = false;
    plan.working_set = Some(dir.join("ws"));
    let (second, handshake) = rig::start(&rig::setup(dir, "second", &[2000]));
    supervisor.add_vm("second", handshake, &plan).unwrap();
    assert!(supervisor.wait_prefetched("second", rig::DEADLINE).unwrap());
    let mut cpu = second.cpu();
    for page in &wanted {
        assert_eq!(cpu.read(*page), crc32fast::hash(&oracle::template(7, *page)));
    }
    let stats = supervisor.vm_stats("second").unwrap();
    assert_eq!((stats.faults(), stats.prefetched, stats.prefetched_zero), (0, 400, 100));
    assert_eq!(stats.working_set_hit_ratio(), Some(1.0));
    cpu.read(1);
    assert_eq!(supervisor.vm_stats("second").unwrap().working_set_miss, 1);
    supervisor.remove_vm("first");
    supervisor.remove_vm("second");
    supervisor.shutdown();
}

#[test]
fn a_bad_working_set_costs_only_time() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, 64);
    std::fs::write(dir.join("garbage"), [7; 999]).unwrap();
    let mut foreign = Bitmap::new(1 << 20);
    foreign.set(1 << 19);
    WorkingSet::from_bitmap(foreign).save(&dir.join("foreign")).unwrap();
    let supervisor = rig::supervisor(dir);
    for name in ["garbage", "foreign", "absent"] {
        let (vmm, handshake) = rig::start(&rig::setup(dir, name, &[64]));
        let mut plan = MemoryPlan::flat(dir.join("memory"), None);
        plan.working_set = Some(dir.join(name));
        supervisor.add_vm(name, handshake, &plan).unwrap();
        assert!(supervisor.wait_prefetched(name, rig::DEADLINE).unwrap());
        assert_eq!(vmm.cpu().read(9), crc32fast::hash(&oracle::template(7, 9)));
        supervisor.remove_vm(name);
    }
    supervisor.shutdown();
}

#[test]
fn layers_are_searched_from_the_top() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, 900);
    ZeroMap::scan(&dir.join("memory")).unwrap().save(&dir.join("zero")).unwrap();
    let zero_map = Some(dir.join("zero"));
    let mut layers = vec![LayerFiles::Flat { memory: dir.join("memory"), zero_map }];
    for layer in 1..=2_u64 {
        let (data, index) = (dir.join(format!("d{layer}")), dir.join(format!("d{layer}.idx")));
        let mut writer = DeltaWriter::create(&data, &index, 900).unwrap();
        for page in (0..900).filter(|page| page % (layer * 5) == 0) {
            let zeros = page % 7 == 0;
            let contents = if zeros { [0; 4096] } else { oracle::written(layer * 1000 + page) };
            writer.page(page, &contents).unwrap();
        }
        let summary = writer.finish().unwrap();
        assert_eq!(summary.data_pages + summary.zero_pages, 900_u64.div_ceil(layer * 5));
        layers.push(LayerFiles::Delta { data, index });
    }
    let expected = |page: u64| match page {
        page if page % 5 != 0 => oracle::template(7, page),
        page if page % 7 == 0 => [0; 4096],
        page if page % 10 == 0 => oracle::written(2000 + page),
        page => oracle::written(1000 + page),
    };
    let supervisor = rig::supervisor(dir);
    // Once by demand alone, once with everything put in place ahead of it.
    let mut all = Bitmap::new(900);
    (0..900).for_each(|page| all.set(page));
    WorkingSet::from_bitmap(all).save(&dir.join("ws")).unwrap();
    for (name, working_set) in [("demand", None), ("ahead", Some(dir.join("ws")))] {
        let (vmm, handshake) = rig::start(&rig::setup(dir, name, &[900]));
        let plan = MemoryPlan { layers: layers.clone(), working_set, ..MemoryPlan::default() };
        supervisor.add_vm(name, handshake, &plan).unwrap();
        assert!(supervisor.wait_prefetched(name, rig::DEADLINE).unwrap());
        vmm.cpu().run(&Command::Dump { path: dir.join("dump") });
        compare(&dir.join("dump"), expected);
        let stats = supervisor.vm_stats(name).unwrap();
        assert_eq!(stats.faults() == 0, name == "ahead", "{stats:?}");
        supervisor.remove_vm(name);
    }
    supervisor.shutdown();
}

#[test]
fn a_graduated_vm_needs_no_page_server() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, 3000);
    ZeroMap::scan(&dir.join("memory")).unwrap().save(&dir.join("zero")).unwrap();
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    let (vmm, handshake) = rig::start(&rig::setup(dir, "vm", &[1000, 2000]));
    let mut plan = MemoryPlan::flat(dir.join("memory"), Some(dir.join("zero")));
    plan.graduate_after = Some(Duration::from_millis(20));
    supervisor.add_vm("vm", handshake, &plan).unwrap();
    let mut cpu = vmm.cpu();
    cpu.run(&Command::Write { page: 17, value: 4 });
    cpu.run(&Command::Remove { first: 200, count: 1 });
    let event = events.recv_timeout(rig::DEADLINE).unwrap();
    assert_eq!(event, PagerEvent::Graduated { id: "vm".into() });
    assert!(supervisor.is_graduated("vm").unwrap());
    // Not served by anybody any more, and all there.
    supervisor.remove_vm("vm");
    supervisor.shutdown();
    assert_eq!(cpu.run(&Command::Remove { first: 300, count: 2 }), Answer::Done);
    cpu.run(&Command::Dump { path: dir.join("dump") });
    compare(&dir.join("dump"), |page| match page {
        17 => oracle::written(4),
        200 | 300 | 301 => [0; 4096],
        page => oracle::template(7, page),
    });
}

#[test]
fn a_vm_can_be_told_to_graduate_also_while_its_page_server_dies() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    oracle::write_memory(&dir.join("memory"), 7, 3000);
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    for (name, killed) in [("quiet", false), ("killed", true)] {
        let (vmm, handshake) = rig::start(&rig::setup(dir, name, &[1000, 2000]));
        let plan = MemoryPlan::flat(dir.join("memory"), None);
        supervisor.add_vm(name, handshake, &plan).unwrap();
        let mut cpu = vmm.cpu();
        cpu.run(&Command::Write { page: 17, value: 4 });
        cpu.run(&Command::Remove { first: 200, count: 1 });
        supervisor.graduate(name).unwrap();
        if killed {
            supervisor.replace_pager();
        }
        rig::eventually(rig::DEADLINE, || match events.try_recv() {
            Ok(PagerEvent::Graduated { id }) => (id == name).then_some(()),
            _ => None,
        });
        assert!(supervisor.is_graduated(name).unwrap());
        supervisor.graduate(name).unwrap();
        cpu.run(&Command::Dump { path: dir.join("dump") });
        compare(&dir.join("dump"), |page| match page {
            17 => oracle::written(4),
            200 => [0; 4096],
            page => oracle::template(7, page),
        });
        drop(vmm);
        supervisor.remove_vm(name);
    }
    assert!(supervisor.graduate("nobody").is_err());
    supervisor.shutdown();
}
