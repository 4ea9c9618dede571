//! What a restore through the driver costs, beside the least that can be done: a bare spawn and one
//! `snapshot/load`. All of them are measured in turn, in the same run, on the same snapshot.
//!
//! ```text
//!   cargo bench -p rethaw-snapshotter --bench firecracker_restore [-- --rounds N]
//! ```
//!
//! Prints JSON, and writes it to `<target>/bench/firecracker-restore.json`. Goal: what a restore costs
//! with a shell prepared ahead, as the pool does it, is at most 1.15 times the bare minimum.
#![allow(clippy::unwrap_used)]

#[path = "../tests/firecracker/guest.rs"]
#[allow(dead_code)]
mod guest;
#[path = "../tests/firecracker/rig.rs"]
#[allow(dead_code)]
mod rig;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rig::{Golden, PATIENCE, Rig, binaries, wait_for_rounds};
use snapshotter::manifest;
use snapshotter::vmm::{Driver, MemoryBackend, Phases};

const GOAL: f64 = 1.15;

/// What a script would do: nothing but the process, the disks it opens, and one request.
fn bare(rig: &Rig, golden: &Golden) -> Duration {
    let home = rig.run_dir(&rig.id());
    std::fs::hard_link(golden.dir.join(manifest::VMSTATE), home.join("vmstate")).unwrap();
    std::fs::hard_link(golden.dir.join(manifest::MEMORY), home.join("memory")).unwrap();
    for disk in ["root.img", "scratch.img"] {
        std::fs::write(home.join(disk), vec![0_u8; 1 << 20]).unwrap();
    }
    let tap = format!("rb{}", std::process::id());
    let body = serde_json::json!({
        "snapshot_path": "vmstate",
        "mem_backend": { "backend_type": "File", "backend_path": "memory" },
        "resume_vm": true,
        "network_overrides": [{ "iface_id": "eth0", "host_dev_name": tap }],
    })
    .to_string();
    let started = Instant::now();
    let mut child = Command::new(binaries().firecracker)
        .args(["--api-sock", "api.sock"])
        .current_dir(&home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stream = loop {
        match UnixStream::connect(home.join("api.sock")) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_micros(100)),
        }
        assert!(started.elapsed() < PATIENCE, "no API socket");
    };
    let length = body.len();
    let head = format!("PUT /snapshot/load HTTP/1.1\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let mut answer = [0; 512];
    let n = stream.read(&mut answer).unwrap();
    let took = started.elapsed();
    let answer = String::from_utf8_lossy(&answer[..n]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::remove_dir_all(home).unwrap();
    took
}

/// Through the driver, from nothing to resumed and from a prepared shell to resumed; and the steps.
async fn driver(
    rig: &Rig,
    golden: &Golden,
    backend: MemoryBackend,
) -> (Duration, Duration, Phases) {
    let spec = rig.restore_spec(golden, backend);
    let started = Instant::now();
    let shell = rig.driver.prepare(&spec).await.unwrap();
    let prepared = Instant::now();
    let (vm, phases) = shell.load().await.unwrap();
    vm.resume().await.unwrap();
    let took = (started.elapsed(), prepared.elapsed(), phases);
    vm.kill().await;
    std::fs::remove_dir_all(&spec.run_dir).unwrap();
    took
}

fn summary(mut times: Vec<Duration>) -> serde_json::Value {
    times.sort();
    let ms = |at: usize| times[at.min(times.len() - 1)].as_secs_f64() * 1e3;
    let n = times.len();
    serde_json::json!({
        "n": n, "min_ms": ms(0), "p50_ms": ms(n / 2), "p90_ms": ms(n * 9 / 10), "max_ms": ms(n - 1),
    })
}

fn rounds() -> usize {
    let mut args = std::env::args().skip_while(|a| a != "--rounds");
    args.nth(1).map_or(30, |n| n.parse().expect("--rounds takes a number"))
}

#[tokio::main]
async fn main() {
    let (jailed, unjailed) = (Rig::new(true).await, Rig::new(false).await);
    let golden = jailed.golden().await;
    // Once through everything, to have files in the page cache and the guest checked.
    for rig in [&jailed, &unjailed] {
        let spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
        let vm = rig.restore(&spec).await;
        wait_for_rounds(&spec.run_dir, 1).await;
        vm.kill().await;
    }
    bare(&unjailed, &golden);
    let mut times: BTreeMap<String, Vec<Duration>> = BTreeMap::new();
    let mut note = |name: String, took| times.entry(name).or_default().push(took);
    for _ in 0..rounds() {
        note("bare".to_owned(), bare(&unjailed, &golden));
        for (jail, rig) in [("unjailed", &unjailed), ("jailed", &jailed)] {
            for (memory, backend) in [("file", MemoryBackend::File), ("uffd", MemoryBackend::Uffd)]
            {
                let name = format!("{jail}_{memory}");
                let (whole, prepared, phases) = driver(rig, &golden, backend).await;
                for (phase, took) in phases {
                    note(format!("{name}.{phase}"), took);
                }
                note(format!("{name}_prepared"), prepared);
                note(name, whole);
            }
        }
    }
    let results: BTreeMap<String, serde_json::Value> =
        times.into_iter().map(|(name, times)| (name, summary(times))).collect();
    let p50 = |name: &str| results[name]["p50_ms"].as_f64().unwrap();
    let ratio = |name: &str| p50(name) / p50("bare");
    let ratios: BTreeMap<&str, f64> = results
        .keys()
        .filter(|n| *n != "bare" && !n.contains('.'))
        .map(|n| (n.as_str(), ratio(n)))
        .collect();
    let report = serde_json::json!({
        "bench": "firecracker_restore",
        "what": "milliseconds until the vCPUs run; bare: spawn and one snapshot/load, no page \
                 server, no jail; prepared: with a process started ahead, as a pool has them",
        "version": jailed.driver.identity().version.to_string(),
        "results": results,
        "p50_ratio_to_bare": ratios,
        "goal": { "name": "jailed_uffd_prepared", "at_most": GOAL,
                  "met": ratio("jailed_uffd_prepared") <= GOAL },
    });
    let text = serde_json::to_string_pretty(&report).unwrap();
    println!("{text}");
    let exe = std::env::current_exe().unwrap();
    let target = exe.ancestors().nth(3).unwrap_or(Path::new("."));
    let dir = target.join("bench");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("firecracker-restore.json"), text + "\n").unwrap();
}
