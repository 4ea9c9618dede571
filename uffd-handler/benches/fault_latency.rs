//! What the page server costs, against the floor measured in the same run.
//!
//! Prints one JSON object, and writes it to `<target>/bench/fault-latency.json`: demand faults (the
//! page server, a minimal loop of raw ioctls that sleeps in poll, the same loop that never sleeps,
//! and the kernel's own fault on a mapped file), bulk installs (working-set replay against raw
//! `UFFDIO_COPY`), 32 VMs at once, a `kill -9` of the page server under load, and a small QEMU guest
//! loaded by the page server, by QEMU itself and from a mapped file. The faulting process is the same
//! in all but the last. `RETHAW_BENCH_PAGES` sets the size.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

#[path = "../tests/qemu_guest/code.rs"]
mod code;
#[path = "../tests/qemu_guest/machine.rs"]
mod machine;
#[path = "../tests/rig/mod.rs"]
mod rig;

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use machine::{DEADLINE, Qemu, freeze};
use memmap2::Mmap;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rig::fake_vmm::{Answer, Command, FakeVmm};
use rig::oracle;
use serde_json::{Value, json};
use uffd_handler::bitmap::Bitmap;
use uffd_handler::handshake::{self, Expect, Handshake};
use uffd_handler::supervisor::{MemoryPlan, PagerEvent, Supervisor};
use uffd_handler::uffd::{Message, MessageSlot, PageFd};
use uffd_handler::working_set::WorkingSet;

const VMS: u64 = 32;
const BATCH: u64 = 2 << 20;
/// Turns of each kind of bulk install; the best counts.
const BULK_ROUNDS: usize = 30;

/// What the page server may cost: median of a demand fault over the floor's, bulk throughput over
/// raw copies, and the longest that anybody may wait while it is replaced.
const FAULT_GOAL: f64 = 1.25;
const BULK_GOAL: f64 = 0.9;
const WAIT_GOAL_MILLIS: f64 = 500.0;

fn main() {
    let pages = std::env::var("RETHAW_BENCH_PAGES").ok().and_then(|n| n.parse().ok());
    let pages: u64 = pages.unwrap_or(16384);
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let memory = dir.join("memory");
    oracle::write_memory(&memory, 7, pages);
    let file = std::fs::File::open(&memory).expect("the memory file");
    // SAFETY: nobody changes the file, which is ours.
    let map = Arc::new(unsafe { Mmap::map(&file) }.expect("a mapping"));

    let faults = pages.min(8192);
    let mut floors = Vec::new();
    let mut servers = Vec::new();
    let mut spinning = Vec::new();
    let mut busy = Vec::new();
    // Turn and turn about: the machine's mood is the same for all.
    for round in 0..3 {
        floors.extend(raw_demand(dir, &format!("floor{round}"), &map, pages, faults, false));
        busy.extend(raw_demand(dir, &format!("busy{round}"), &map, pages, faults, true));
        servers.extend(served_demand(dir, &format!("sleep{round}"), pages, faults, Duration::ZERO));
        let window = Duration::from_micros(100);
        spinning.extend(served_demand(dir, &format!("spin{round}"), pages, faults, window));
    }
    let file_fault = file_faults(&map, pages);
    let Bulk { raw, replay, fixed_micros } = bulk(dir, &map, pages);
    let takeover = takeover(dir, pages);
    let longest_wait = takeover["fault_wait_micros"]["max"].as_f64().unwrap_or(f64::NAN) / 1000.0;
    let report = json!({
        "bench": "fault_latency",
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "memory_bytes": pages * 4096,
        "demand_fault_micros": {
            "page_server": percentiles(&spinning),
            "page_server_always_sleeping": percentiles(&servers),
            "floor_poll_and_copy": percentiles(&floors),
            "floor_never_sleeping": percentiles(&busy),
            "kernel_mapped_file": percentiles(&file_fault),
            "p50_over_floor": ratio(&spinning, &floors),
            "p50_always_sleeping_over_floor": ratio(&servers, &floors),
        },
        "bulk_fill": {
            "raw_copy_bytes_per_second": raw,
            "working_set_replay_bytes_per_second": replay,
            "over_raw": replay / raw,
            "replay_of_one_page_micros_p50": fixed_micros,
        },
        "many_vms": many(dir, pages),
        "takeover": takeover,
        "small_qemu_guest": qemu(&rig::shim()),
        "goals": {
            "demand_fault_over_floor": goal(ratio(&spinning, &floors), FAULT_GOAL, false),
            "bulk_over_raw": goal(replay / raw, BULK_GOAL, true),
            "longest_wait_millis_when_killed": goal(longest_wait, WAIT_GOAL_MILLIS, false),
        },
    });
    let text = serde_json::to_string_pretty(&report).expect("JSON");
    println!("{text}");
    let exe = std::env::current_exe().expect("this program");
    let out = exe.ancestors().nth(3).expect("<target>/<profile>/deps").join("bench");
    std::fs::create_dir_all(&out).expect("a directory");
    std::fs::write(out.join("fault-latency.json"), text + "\n").expect("written");
}

fn goal(found: f64, limit: f64, at_least: bool) -> Value {
    let kind = if at_least { "at_least" } else { "at_most" };
    let met = if at_least { found >= limit } else { found <= limit };
    json!({"found": (found * 1000.0).round() / 1000.0, kind: limit, "met": met})
}

fn percentile(sorted: &[u64], part: f64) -> f64 {
    let index = ((sorted.len() as f64 * part) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(index).map_or(0.0, |nanos| *nanos as f64 / 1000.0)
}

fn sorted(waits: &[u64]) -> Vec<u64> {
    let mut waits = waits.to_vec();
    waits.sort_unstable();
    waits
}

fn percentiles(waits: &[u64]) -> Value {
    let waits = sorted(waits);
    let at = |part| (percentile(&waits, part) * 100.0).round() / 100.0;
    json!({"count": waits.len(), "p50": at(0.5), "p99": at(0.99), "p999": at(0.999), "max": at(1.0)})
}

fn ratio(ours: &[u64], floor: &[u64]) -> f64 {
    percentile(&sorted(ours), 0.5) / percentile(&sorted(floor), 0.5)
}

fn storm(vmm: &FakeVmm, count: u64, threads: u64) -> Vec<u64> {
    match vmm.cpu().run(&Command::Storm { first: 0, count, threads }) {
        Answer::Storm { wrong: 0, waits_nanos } => waits_nanos,
        other => panic!("{other:?}"),
    }
}

/// The least that a page server can do: wait, read one message, copy one page.
fn raw_demand(
    dir: &Path,
    name: &str,
    map: &Arc<Mmap>,
    pages: u64,
    faults: u64,
    busy: bool,
) -> Vec<u64> {
    let (vmm, handshake) = rig::start(&rig::setup(dir, name, &[pages]));
    let Handshake { uffd, regions, .. } = handshake;
    let stop = Arc::new(AtomicBool::new(false));
    let (ended, map, base) = (stop.clone(), map.clone(), regions[0].base);
    let server = std::thread::spawn(move || {
        let uffd = PageFd::new(uffd);
        let message = [MessageSlot::default()];
        while !ended.load(Ordering::Relaxed) {
            if !busy {
                let mut fds = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut fds, PollTimeout::from(50_u8));
            }
            let Ok(1) = uffd.read(&message) else { continue };
            let Message::Fault { address, .. } = message[0].decode() else { continue };
            let page = address & !4095;
            // SAFETY: the mapping has as many pages as the region.
            unsafe { uffd.copy(page, map.as_ptr().add((page - base) as usize), 4096, true) };
        }
    });
    let waits = storm(&vmm, faults, 1);
    stop.store(true, Ordering::Relaxed);
    server.join().expect("the loop ends");
    waits
}

fn server(dir: &Path, name: &str, spin: Duration) -> Supervisor {
    let mut config = rig::config(dir);
    config.socket = dir.join(format!("{name}.pager"));
    config.spin = spin;
    Supervisor::start(config).expect("a page server")
}

fn served_demand(dir: &Path, name: &str, pages: u64, faults: u64, spin: Duration) -> Vec<u64> {
    let supervisor = server(dir, name, spin);
    let (vmm, handshake) = rig::start(&rig::setup(dir, name, &[pages]));
    let plan = MemoryPlan::flat(dir.join("memory"), None);
    supervisor.add_vm(name, handshake, &plan).expect("served");
    let waits = storm(&vmm, faults, 1);
    drop(vmm);
    supervisor.shutdown();
    waits
}

/// What the same read costs where the memory file itself is mapped.
fn file_faults(map: &Mmap, pages: u64) -> Vec<u64> {
    // Every sixteenth page, which is as far as the kernel maps ahead.
    let mut waits = Vec::new();
    // SAFETY: a read-only mapping of a file loses nothing when its pages are unmapped.
    unsafe {
        libc::madvise(map.as_ptr() as *mut libc::c_void, map.len(), libc::MADV_DONTNEED);
    }
    for page in (0..pages).step_by(16) {
        let began = Instant::now();
        // SAFETY: within the mapping.
        let byte = unsafe { map.as_ptr().add((page * 4096) as usize).read_volatile() };
        waits.push(began.elapsed().as_nanos() as u64);
        std::hint::black_box(byte);
    }
    waits
}

/// Bytes per second, and what a replay costs apart from its bytes.
struct Bulk {
    raw: f64,
    replay: f64,
    fixed_micros: f64,
}

fn save_set(path: &Path, pages: u64, members: std::ops::Range<u64>) {
    let mut set = Bitmap::new(pages);
    members.for_each(|page| set.set(page));
    WorkingSet::from_bitmap(set).save(path).expect("saved");
}

/// From handing a new VM on until its working set is in place.
fn replay_time(supervisor: &Supervisor, dir: &Path, name: &str, pages: u64, set: &str) -> Duration {
    let (vmm, handshake) = rig::start(&rig::setup(dir, name, &[pages]));
    let mut plan = MemoryPlan::flat(dir.join("memory"), None);
    plan.working_set = Some(dir.join(set));
    let began = Instant::now();
    supervisor.add_vm(name, handshake, &plan).expect("served");
    assert!(supervisor.wait_prefetched(name, rig::DEADLINE).expect("known"));
    let time = began.elapsed();
    drop(vmm);
    supervisor.remove_vm(name);
    time
}

/// The rate of raw copies of 2 MiB, and of replaying a working set of everything (all that it costs
/// from handing on the VM included); beside it, what replaying one page costs.
fn bulk(dir: &Path, map: &Arc<Mmap>, pages: u64) -> Bulk {
    save_set(&dir.join("everything"), pages, 0..pages);
    save_set(&dir.join("one-page"), pages, 0..1);
    let supervisor = server(dir, "bulk", Duration::ZERO);
    // Another VM of the template, as a pool has: the memory file stays open and mapped.
    let (neighbour, handshake) = rig::start(&rig::setup(dir, "neighbour", &[pages]));
    let mut plan = MemoryPlan::flat(dir.join("memory"), None);
    plan.working_set = Some(dir.join("everything"));
    supervisor.add_vm("neighbour", handshake, &plan).expect("served");
    assert!(supervisor.wait_prefetched("neighbour", rig::DEADLINE).expect("known"));
    let (mut raw, mut replay, mut fixed) = (Duration::MAX, Duration::MAX, Vec::new());
    let len = pages * 4096;
    for round in 0..BULK_ROUNDS {
        let (vmm, handshake) = rig::start(&rig::setup(dir, &format!("raw{round}"), &[pages]));
        let uffd = PageFd::new(handshake.uffd);
        let base = handshake.regions[0].base;
        let began = Instant::now();
        let mut at = 0;
        while at < len {
            let size = BATCH.min(len - at);
            // SAFETY: the mapping has as many pages as the region.
            let fill = unsafe { uffd.copy(base + at, map.as_ptr().add(at as usize), size, false) };
            assert_eq!(fill.installed, size);
            at += size;
        }
        raw = raw.min(began.elapsed());
        drop((vmm, uffd));

        let name = format!("replay{round}");
        replay = replay.min(replay_time(&supervisor, dir, &name, pages, "everything"));
        let name = format!("one{round}");
        let time = replay_time(&supervisor, dir, &name, pages, "one-page");
        fixed.push(time.as_nanos() as u64);
    }
    drop(neighbour);
    supervisor.shutdown();
    let rate = |time: Duration| len as f64 / time.as_secs_f64();
    let fixed_micros = percentile(&sorted(&fixed), 0.5);
    Bulk { raw: rate(raw), replay: rate(replay), fixed_micros }
}

/// Many VMs that all ask at once: does one starve?
fn many(dir: &Path, pages: u64) -> Value {
    let supervisor = server(dir, "many", Duration::from_micros(100));
    let mut vmms = Vec::new();
    for i in 0..VMS {
        let name = format!("many{i}");
        let (vmm, handshake) = rig::start(&rig::setup(dir, &name, &[pages]));
        supervisor
            .add_vm(&name, handshake, &MemoryPlan::flat(dir.join("memory"), None))
            .expect("served");
        let cpu = vmm.cpu();
        vmms.push((vmm, cpu));
    }
    let began = Instant::now();
    for (_, cpu) in &mut vmms {
        cpu.send(&Command::Storm { first: 0, count: 512, threads: 1 });
    }
    let mut all = Vec::new();
    let mut totals = Vec::new();
    for (_, cpu) in &mut vmms {
        match cpu.answer_within(rig::DEADLINE) {
            Some(Answer::Storm { wrong: 0, waits_nanos }) => {
                totals.push(waits_nanos.iter().sum::<u64>());
                all.extend(waits_nanos);
            }
            other => panic!("{other:?}"),
        }
    }
    let elapsed = began.elapsed();
    let totals = sorted(&totals);
    let report = json!({
        "vms": VMS,
        "faults": all.len(),
        "faults_per_second": all.len() as f64 / elapsed.as_secs_f64(),
        "wait_micros": percentiles(&all),
        "total_wait_of_a_vm_max_over_median":
            totals[totals.len() - 1] as f64 / totals[totals.len() / 2] as f64,
    });
    drop(vmms);
    supervisor.shutdown();
    report
}

/// `kill -9` of the page server while a VM asks for page after page.
fn takeover(dir: &Path, pages: u64) -> Value {
    let supervisor = server(dir, "takeover", Duration::from_micros(100));
    let events = supervisor.events();
    let (vmm, handshake) = rig::start(&rig::setup(dir, "takeover", &[pages]));
    let plan = MemoryPlan::flat(dir.join("memory"), None);
    supervisor.add_vm("takeover", handshake, &plan).expect("served");
    let mut cpu = vmm.cpu();
    cpu.send(&Command::Storm { first: 0, count: pages, threads: 2 });
    let mut takeovers = Vec::new();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(50));
        supervisor.replace_pager();
        match events.recv_timeout(rig::DEADLINE) {
            Ok(PagerEvent::PagerRestarted { millis, .. }) => takeovers.push(millis),
            other => panic!("{other:?}"),
        }
    }
    let Some(Answer::Storm { wrong: 0, waits_nanos }) = cpu.answer_within(rig::DEADLINE) else {
        panic!("the guest saw a wrong page or none");
    };
    drop(vmm);
    supervisor.shutdown();
    json!({"takeover_millis": takeovers, "fault_wait_micros": percentiles(&waits_nanos)})
}

/// A guest that reads all of its 32 MiB, loaded in three ways: milliseconds from the start of QEMU
/// until it runs, and until it has seen every page.
fn qemu(shim: &Path) -> Value {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    freeze(dir);
    let supervisor = server(dir, "qemu", Duration::from_micros(100));
    let memory = dir.join("memory");
    let mapped =
        format!("memory-backend-file,id=mem,size=32M,share=off,mem-path={}", memory.display());
    let anonymous = "memory-backend-memfd,id=mem,size=32M,share=on";
    let mut ways = [("page_server", vec![]), ("qemu_itself", vec![]), ("mapped_file", vec![])];
    for round in 0..5 {
        for (name, samples) in &mut ways {
            let _ = std::fs::remove_file(dir.join("out"));
            let (backend, state) = match *name {
                "page_server" => (anonymous, "state"),
                "qemu_itself" => (anonymous, "whole"),
                _ => (mapped.as_str(), "state"),
            };
            let socket = dir.join(format!("handshake{round}"));
            let size = code::MEMORY_BYTES.to_string();
            let paths = [shim, &socket].map(|path| path.to_str().expect("UTF-8").to_owned());
            let env = [
                ("LD_PRELOAD", paths[0].as_str()),
                ("RETHAW_UFFD_SIZE", &size),
                ("RETHAW_UFFD_SOCKET", &paths[1]),
            ];
            let served = *name == "page_server";
            let listener = served.then(|| UnixListener::bind(&socket).expect("a socket"));
            let began = Instant::now();
            let incoming = ["-S", "-incoming", "defer"];
            let qemu = Qemu::start(dir, backend, &incoming, if served { &env } else { &[] });
            if let Some(listener) = listener {
                let pid = Some(qemu.child.id() as i32);
                let expect =
                    Expect { memory_bytes: code::MEMORY_BYTES, peer_uid: None, peer_pid: pid };
                let shaken = handshake::accept(&listener, &expect, DEADLINE).expect("a handshake");
                let plan = MemoryPlan::flat(&memory, None);
                supervisor.add_vm(&format!("qemu{round}"), shaken, &plan).expect("served");
            }
            let mut qmp = qemu.qmp();
            let uri = format!("cat {}/{state}", dir.display());
            qmp.migrate("migrate-incoming", &uri, state == "state");
            qmp.command("cont", "{}");
            let runs = began.elapsed();
            assert!(!qemu.wait_output(1).contains('X'), "the guest saw a wrong page");
            samples.push((runs.as_nanos() as u64, began.elapsed().as_nanos() as u64));
            drop(qemu);
            supervisor.remove_vm(&format!("qemu{round}"));
        }
    }
    supervisor.shutdown();
    let median = |of: Vec<u64>| percentile(&sorted(&of), 0.5) / 1000.0;
    let rows = ways.into_iter().map(|(name, samples)| {
        let (runs, seen) = samples.into_iter().unzip();
        let row =
            json!({"runs_millis_p50": median(runs), "all_pages_seen_millis_p50": median(seen)});
        (name.to_owned(), row)
    });
    Value::Object(rows.collect())
}
