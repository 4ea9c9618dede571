//! Churn: sandboxes are made, used, paused, resumed, forked and deleted while parts of the service
//! are killed. No byte may be wrong, no workspace lost, nothing may be left.
//!
//! Runs for `RETHAW_SOAK_SECONDS` (45 when unset; `scripts/soak` runs half an hour). The seed is
//! printed; `RETHAW_SOAK_SEED` repeats a run's choices.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;

use crate::process::Process;
use crate::service::{Service, id};

const MOST_SANDBOXES: usize = 5;
const POOL: u32 = 3;

/// What must be found again in a sandbox: digests of a file in memory and one on disk, and a
/// process that was started once.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Contents {
    sums: String,
    pid: String,
}

const FILL: &str = "head -c 2097152 /dev/urandom > /dev/shm/blob; \
     head -c 1048576 /dev/urandom > /root/blob; sync; \
     (while :; do sleep 1; done) >&- 2>&- & echo $! > /dev/shm/pid";
const LOOK: &str = "cat /dev/shm/blob | sha256sum; cat /root/blob | sha256sum";
const PID: &str = "p=$(cat /dev/shm/pid); kill -0 $p && echo $p";

/// What a process holds.
#[derive(Debug, Clone, Copy)]
struct Holdings {
    descriptors: usize,
    anonymous_kib: u64,
}

impl Holdings {
    fn of(process: &Process) -> Self {
        let dir = format!("/proc/{}", process.pid);
        let status = std::fs::read_to_string(format!("{dir}/status")).unwrap();
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        let anonymous = anonymous.trim().trim_end_matches(" kB").parse().unwrap();
        let descriptors = std::fs::read_dir(format!("{dir}/fd")).unwrap().count();
        Self { descriptors, anonymous_kib: anonymous }
    }
}

struct Soak {
    service: Service,
    sandboxes: BTreeMap<String, Contents>,
    random: StdRng,
    done: BTreeMap<&'static str, u32>,
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

#[tokio::test]
async fn churn_loses_nothing_and_leaves_nothing() {
    let seconds = setting("RETHAW_SOAK_SECONDS").unwrap_or(45);
    let seed = setting("RETHAW_SOAK_SEED").unwrap_or_else(rand::random);
    println!("soak: {seconds} s, RETHAW_SOAK_SEED={seed}");
    let mut soak = Soak {
        service: Service::start(POOL).await,
        sandboxes: BTreeMap::new(),
        random: StdRng::seed_from_u64(seed),
        done: BTreeMap::new(),
    };
    // Once through everything, so that what is made on first use is there before it is counted.
    for step in STEPS {
        soak.step(step).await;
    }
    let before = soak.at_rest().await;
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        let step = STEPS.into_iter().choose(&mut soak.random).unwrap();
        soak.step(step).await;
    }
    let after = soak.at_rest().await;
    println!("soak: {:?}; before {before:?}, after {after:?}", soak.done);
    for (before, after) in before.into_iter().zip(after) {
        assert!(after.descriptors <= before.descriptors + 8, "{before:?} {after:?}");
        assert!(after.anonymous_kib <= before.anonymous_kib + (48 << 10), "{before:?} {after:?}");
    }
    soak.service.stop().await;
}

/// A step by name; what it needs and is not there makes it a `create`.
const STEPS: [&str; 10] = [
    "create",
    "create",
    "look",
    "pause",
    "fork",
    "delete",
    "kill pager",
    "kill service",
    "kill vm",
    "kill parked",
];

impl Soak {
    async fn step(&mut self, step: &'static str) {
        *self.done.entry(step).or_default() += 1;
        let chosen = self.sandboxes.keys().choose(&mut self.random).cloned();
        match (step, chosen) {
            ("kill pager", _) => {
                // The one before may have been killed a moment ago.
                let service = &self.service;
                let there = async || service.home().pager();
                service.until("there is a page server", there).await.kill();
                self.all_are_right().await;
            }
            ("kill service", _) => {
                self.service.crash().await;
                self.service.start_again().await;
                self.all_are_right().await;
            }
            ("kill parked", _) => {
                let ids = self.service.home().vm_ids();
                let parked = ids.into_iter().find(|id| !self.sandboxes.contains_key(id));
                if let Some(id) = parked {
                    self.kill_vm(&id);
                }
            }
            ("look", Some(id)) => self.is_right(&id).await,
            ("pause", Some(id)) => self.pause(&id).await,
            ("fork", Some(id)) => self.fork(&id).await,
            ("delete", Some(id)) => self.delete(&id).await,
            ("kill vm", Some(id)) => {
                self.kill_vm(&id);
                self.sandboxes.remove(&id);
                self.service.sandbox_gone(&id).await;
            }
            _ => self.create().await,
        }
        while self.sandboxes.len() > MOST_SANDBOXES {
            let id = self.sandboxes.keys().choose(&mut self.random).unwrap().clone();
            self.delete(&id).await;
        }
    }

    fn kill_vm(&self, id: &str) {
        // It may be on its way out already, as a parked one that was just replaced.
        for process in crate::process::processes_of(&self.service.home().vm_dir(id)) {
            process.kill();
        }
    }

    async fn contents(&self, id: &str) -> Contents {
        let sums = self.service.sh(id, LOOK).await;
        Contents { sums, pid: self.service.sh(id, PID).await }
    }

    async fn is_right(&self, id: &str) {
        assert_eq!(self.contents(id).await, self.sandboxes[id], "sandbox {id}");
    }

    async fn all_are_right(&self) {
        for id in self.sandboxes.keys() {
            self.is_right(id).await;
        }
    }

    async fn create(&mut self) {
        let id = self.service.create().await;
        self.service.sh(&id, FILL).await;
        self.sandboxes.insert(id.clone(), self.contents(&id).await);
    }

    async fn pause(&mut self, id: &str) {
        self.service.act(id, "pause", &json!({})).await.expect(200);
        if self.random.random_bool(0.3) {
            self.service.crash().await;
            self.service.start_again().await;
        }
        assert_eq!(self.service.sandbox(id).await.expect(200)["state"], "paused");
        self.service.act(id, "resume", &json!({})).await.expect(200);
        self.is_right(id).await;
    }

    async fn fork(&mut self, source: &str) {
        let reply = self.service.act(source, "fork", &json!({ "count": 2 })).await.expect(201);
        for clone in reply["items"].as_array().unwrap() {
            self.sandboxes.insert(id(clone), self.sandboxes[source].clone());
            self.is_right(&id(clone)).await;
        }
        self.is_right(source).await;
    }

    async fn delete(&mut self, id: &str) {
        let path = format!("/v1/sandboxes/{id}");
        let reply = self.service.client().delete(&path).await;
        assert_eq!(reply.status, 204, "{}", reply.text());
        self.sandboxes.remove(id);
    }

    /// Holdings of service and page server when nothing is to be held.
    async fn at_rest(&mut self) -> [Holdings; 2] {
        self.service.set_pool(0).await;
        // A service that was just started has a spare VMM only once somebody asked for a sandbox.
        self.create().await;
        for id in self.sandboxes.keys().cloned().collect::<Vec<_>>() {
            self.delete(&id).await;
        }
        let service = &self.service;
        service
            .until("no VM is left but the spare", async || {
                (service.home().vm_dirs().len() == 1).then_some(())
            })
            .await;
        service
            .until("no snapshot is left of sandboxes that are gone", async || {
                service.home().workspaces().is_empty().then_some(())
            })
            .await;
        let there = async || service.home().pager();
        let pager = service.until("there is a page server", there).await;
        let held = [Holdings::of(&service.process()), Holdings::of(&pager)];
        self.service.set_pool(POOL).await;
        held
    }
}
