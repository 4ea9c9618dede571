//! The recent past: a ring of points, one for every interval.
//!
//! The ring is in memory and bounded. Whoever wants more than its minutes has `/metrics`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use time::OffsetDateTime;
use tokio::time::MissedTickBehavior;
use uffd_handler::stats::Stats;
use utoipa::ToSchema;

use super::faults::{self, Faults};
use super::host::{HostNow, HostProbe};
use super::latency::{self, Summary};
use super::{changed, listen};
use crate::engine::Engine;
use crate::engine::sandbox::State;

/// Length of an interval.
pub const INTERVAL: Duration = Duration::from_secs(2);
/// How long after a change pools are looked at.
const HEADWAY: Duration = Duration::from_millis(3);
/// Points kept: ten minutes.
pub const CAPACITY: usize = 300;

/// One interval.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = LivePoint)]
pub struct Point {
    /// Counts up by one from point to point.
    pub seq: u64,
    /// Its end.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// Claims answered with a parked VM.
    pub claims_warm: Summary,
    /// Claims that waited for a restore.
    pub claims_cold: Summary,
    /// Restores up to the proven identity.
    pub restores: Summary,
    /// The page server's work.
    pub faults: Faults,
    /// Pools by template.
    pub pools: BTreeMap<String, PoolPoint>,
    /// Sandboxes whose processes run.
    pub sandboxes_running: u32,
    /// Sandboxes on disk.
    pub sandboxes_paused: u32,
    /// The host.
    pub host: HostNow,
}

/// A pool over one interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = LivePool)]
pub struct PoolPoint {
    /// Parked VMs at its end.
    pub ready: u32,
    /// The fewest there were.
    pub low: u32,
    /// How many there should have been.
    pub target: u32,
}

/// The ring.
#[derive(Debug, Default)]
pub struct History {
    points: Mutex<VecDeque<Point>>,
}

impl History {
    /// All points, oldest first.
    pub fn points(&self) -> Vec<Point> {
        self.lock().iter().cloned().collect()
    }

    /// The points after the one numbered `seq`, oldest first.
    pub fn after(&self, seq: u64) -> Vec<Point> {
        self.lock().iter().filter(|point| point.seq > seq).cloned().collect()
    }

    fn push(&self, point: Point) {
        let mut points = self.lock();
        if points.len() == CAPACITY {
            points.pop_front();
        }
        points.push_back(point);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Point>> {
        self.points.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a point for every interval, until it is dropped.
    pub async fn record(self: Arc<Self>, engine: Arc<Engine>) {
        let mut ticks = tokio::time::interval(INTERVAL);
        // The rates divide by the time that really passed.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        let mut bell = listen();
        let mut sampler = Sampler::new(&engine);
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    self.push(sampler.end_interval(&engine));
                    changed();
                }
                // The bell is one of this process and never goes away.
                _ = bell.changed() => {
                    // It rings in the midst of claims, and a pool is not refilled that soon.
                    tokio::time::sleep(HEADWAY).await;
                    bell.mark_unchanged();
                    sampler.watch_pools(&engine);
                }
            }
        }
    }
}

/// What has to be remembered from one point to the next.
#[derive(Debug)]
struct Sampler {
    seq: u64,
    since: Instant,
    host: HostProbe,
    stats: Stats,
    lows: BTreeMap<String, u32>,
}

impl Sampler {
    fn new(engine: &Engine) -> Self {
        Self {
            seq: 0,
            since: Instant::now(),
            host: HostProbe::new(&engine.config().home),
            stats: engine.pager().stats(),
            lows: BTreeMap::new(),
        }
    }

    fn watch_pools(&mut self, engine: &Engine) {
        for (template, numbers) in engine.pool_numbers() {
            let low = self.lows.entry(template).or_insert(numbers.ready);
            *low = numbers.ready.min(*low);
        }
    }

    fn end_interval(&mut self, engine: &Engine) -> Point {
        let stats = engine.pager().stats();
        let before = std::mem::replace(&mut self.stats, stats);
        let since = std::mem::replace(&mut self.since, Instant::now());
        let lows = std::mem::take(&mut self.lows);
        let pools = engine.pool_numbers().into_iter().map(|(template, numbers)| {
            let low = lows.get(&template).copied().unwrap_or(numbers.ready).min(numbers.ready);
            (template, PoolPoint { ready: numbers.ready, low, target: numbers.target })
        });
        let pools = pools.collect();
        // The next interval begins with what is there now.
        self.watch_pools(engine);
        let states: Vec<State> = engine.sandboxes().iter().map(|s| s.state()).collect();
        let count = |wanted| states.iter().filter(|state| **state == wanted).count() as u32;
        let [claims_warm, claims_cold, restores] = latency::end_interval();
        self.seq += 1;
        Point {
            seq: self.seq,
            at: OffsetDateTime::now_utc(),
            claims_warm,
            claims_cold,
            restores,
            faults: faults::between(&before, &self.stats, self.since - since),
            pools,
            sandboxes_running: count(State::Running),
            sandboxes_paused: count(State::Paused),
            host: self.host.look(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(seq: u64) -> Point {
        Point {
            seq,
            at: OffsetDateTime::UNIX_EPOCH,
            claims_warm: Summary::default(),
            claims_cold: Summary::default(),
            restores: Summary::default(),
            faults: Faults::default(),
            pools: BTreeMap::new(),
            sandboxes_running: 0,
            sandboxes_paused: 0,
            host: HostNow::default(),
        }
    }

    #[test]
    fn the_ring_forgets_the_oldest() {
        let history = History::default();
        (1..=CAPACITY as u64 + 5).for_each(|seq| history.push(point(seq)));
        let points = history.points();
        assert_eq!((points.len(), points[0].seq), (CAPACITY, 6));
        let new: Vec<u64> = history.after(CAPACITY as u64 + 3).iter().map(|p| p.seq).collect();
        assert_eq!(new, [CAPACITY as u64 + 4, CAPACITY as u64 + 5]);
    }
}
