//! A template's warm pool: parked VMs, proven and paused, and the task that keeps their number up.
//!
//! Nothing here runs on a timer: a claim, a death, a changed target or a finished restore wakes the
//! refill. Refill runs at low priority and does not start a restore while a claim is under way.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tracing::Instrument;

use super::context::RestoreContext;
use super::ids;
use super::lifecycle::Spawned;
use super::parked::{self, Parked, WarmUp};
use super::spare::Spare;
use super::template::ReadyTemplate;
use crate::{live, log};

/// Longest pause between two attempts after a restore failed.
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// A pool from which something was taken within this time has no time for more than the least
/// warm-up: the next claim may need the VM.
const BUSY: Duration = Duration::from_secs(5);
/// How long a template that no VM is parked for has a spare VMM after a claim.
const SPARE_LINGERS: Duration = Duration::from_secs(600);
/// How long after the last claim a restore starts: its answer has been read by then.
const HEADWAY: Duration = Duration::from_millis(3);
/// How long claims can keep a restore from starting.
const MOST_HEADWAY: Duration = Duration::from_millis(500);
/// Restores under way at once for one pool.
const REFILL_CONCURRENCY: u32 = 2;

#[derive(Debug)]
struct Entry {
    parked: Parked,
    // Watches the process; aborted when the VM is taken.
    watcher: AbortHandle,
}

/// A pool.
#[derive(Debug)]
pub struct Pool {
    /// Its template.
    pub template: Arc<ReadyTemplate>,
    context: RestoreContext,
    target: AtomicU32,
    restoring: AtomicU32,
    misses: AtomicU64,
    closed: AtomicBool,
    ended: watch::Sender<bool>,
    last_taken: Mutex<Option<Instant>>,
    ready: Mutex<VecDeque<Entry>>,
    wake: Notify,
    spare: Spare,
    // How many claims are under way in the whole service.
    claims: watch::Receiver<u32>,
}

/// A pool's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolNumbers {
    /// VMs it tries to keep.
    pub target: u32,
    /// VMs parked.
    pub ready: u32,
    /// VMs being restored.
    pub restoring: u32,
    /// Claims that found it empty.
    pub misses_total: u64,
}

impl Pool {
    /// A pool that is empty until [`Pool::run`] is spawned.
    pub fn new(
        template: Arc<ReadyTemplate>,
        context: RestoreContext,
        target: u32,
        claims: watch::Receiver<u32>,
    ) -> Arc<Self> {
        Arc::new(Self {
            template,
            context,
            target: AtomicU32::new(target),
            restoring: AtomicU32::new(0),
            misses: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            ended: watch::Sender::new(false),
            last_taken: Mutex::new(None),
            ready: Mutex::new(VecDeque::new()),
            wake: Notify::new(),
            spare: Spare::default(),
            claims,
        })
    }

    /// Its numbers now.
    pub fn numbers(&self) -> PoolNumbers {
        PoolNumbers {
            target: self.target.load(Ordering::Relaxed),
            ready: self.entries().len() as u32,
            restoring: self.restoring.load(Ordering::Relaxed),
            misses_total: self.misses.load(Ordering::Relaxed),
        }
    }

    /// Changes how many VMs it tries to keep.
    pub fn set_target(&self, target: u32) {
        self.target.store(target, Ordering::Relaxed);
        live::changed();
        self.wake.notify_one();
        self.spare.look_again();
    }

    /// Takes a parked VM, or counts a miss.
    pub fn take(&self) -> Option<Parked> {
        *self.last_taken() = Some(Instant::now());
        let entry = self.entries().pop_front();
        live::changed();
        if let Some(entry) = entry {
            entry.watcher.abort();
            self.wake.notify_one();
            return Some(entry.parked);
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        metrics::counter!("rethaw_pool_misses_total", "template" => self.template.name.clone())
            .increment(1);
        self.wake.notify_one();
        self.spare.look_again();
        None
    }

    /// Takes the spawned VMM that waits for a claim that finds no parked VM.
    pub fn take_spare(&self) -> Option<Spawned> {
        let mut spawned = self.spare.take()?;
        spawned.wanted();
        Some(spawned)
    }

    /// Puts in a VM that is parked already.
    pub fn put(self: &Arc<Self>, parked: Parked) {
        let vm = Arc::clone(&parked.inner.machine.vm);
        let (pool, id) = (Arc::clone(self), parked.inner.id.clone());
        // The entry must be in before its watcher can look for it.
        let mut entries = self.entries();
        let watcher = tokio::spawn(async move {
            let reason = vm.exited().await;
            drop(vm);
            pool.remove_dead(&id, &reason.to_string()).await;
        });
        entries.push_back(Entry { parked, watcher: watcher.abort_handle() });
        drop(entries);
        live::changed();
    }

    /// Keeps the number of parked VMs at the target until the pool is closed.
    pub async fn run(self: Arc<Self>) {
        let wanted = || self.spare_is_wanted_for();
        let spare = self.spare.keep(&self.context, &self.template, self.claims.clone(), wanted);
        tokio::join!(self.refill(), spare);
        let _ = self.ended.send_replace(true);
    }

    /// Resolves when [`Pool::run`] has ended.
    pub async fn ended(&self) {
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    async fn refill(self: &Arc<Self>) {
        let mut restores = JoinSet::new();
        let mut backoff = Duration::ZERO;
        loop {
            if self.closed.load(Ordering::Relaxed) {
                break;
            }
            self.drop_surplus().await;
            while self.wants_more() {
                self.restoring.fetch_add(1, Ordering::Relaxed);
                live::changed();
                let pool = Arc::clone(self);
                let wait = backoff;
                restores.spawn(async move { pool.restore_one(wait).await });
            }
            tokio::select! {
                () = self.wake.notified() => {}
                Some(done) = restores.join_next(), if !restores.is_empty() => {
                    self.restoring.fetch_sub(1, Ordering::Relaxed);
                    live::changed();
                    backoff = match done {
                        Ok(true) => Duration::ZERO,
                        _ => (backoff * 2).clamp(Duration::from_millis(100), MAX_BACKOFF),
                    };
                }
            }
        }
        // A restore under way is finished and then destroyed: aborting it would leave its clean-up
        // to whoever drops the pieces.
        while restores.join_next().await.is_some() {
            self.restoring.fetch_sub(1, Ordering::Relaxed);
        }
        self.destroy_all().await;
    }

    /// Ends [`Pool::run`], which then destroys every parked VM.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.wake.notify_one();
        self.spare.close();
    }

    /// A pool that is to be empty has a spare VMM only while its template is used.
    fn spare_is_wanted_for(&self) -> Duration {
        if self.target.load(Ordering::Relaxed) > 0 {
            return SPARE_LINGERS;
        }
        let since = self.last_taken().map(|at| at.elapsed());
        since.map_or(Duration::ZERO, |since| SPARE_LINGERS.saturating_sub(since))
    }

    fn is_busy(&self) -> bool {
        self.last_taken().is_some_and(|at| at.elapsed() < BUSY)
    }

    fn last_taken(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.last_taken.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn wants_more(&self) -> bool {
        let n = self.numbers();
        n.ready + n.restoring < n.target && n.restoring < REFILL_CONCURRENCY
    }

    async fn restore_one(self: &Arc<Self>, wait: Duration) -> bool {
        tokio::time::sleep(wait).await;
        let_claims_go_first(&self.claims).await;
        let started = Instant::now();
        let warm_up = if self.is_busy() { WarmUp::Claim } else { WarmUp::ClaimAndCommand };
        // Named like a request, in all logs; and so the agent is asked just as it will be.
        let span =
            tracing::info_span!(log::REQUEST, id = %ids::new_id(), refill = %self.template.name);
        match parked::restore(&self.context, &self.template, warm_up).instrument(span).await {
            Ok(parked) => {
                self.put(parked);
                let name = self.template.name.clone();
                metrics::histogram!("rethaw_pool_refill_duration_seconds", "template" => name)
                    .record(started.elapsed().as_secs_f64());
                true
            }
            Err(e) => {
                tracing::error!(template = %self.template.name, "refill: {e}");
                false
            }
        }
    }

    async fn remove_dead(&self, id: &str, reason: &str) {
        let entry = {
            let mut entries = self.entries();
            let at = entries.iter().position(|e| e.parked.inner.id == id);
            at.and_then(|at| entries.remove(at))
        };
        let Some(entry) = entry else { return };
        live::changed();
        tracing::warn!(vm = id, "parked VM {reason}; replacing it");
        metrics::counter!("rethaw_pool_deaths_total", "template" => self.template.name.clone())
            .increment(1);
        self.destroy(entry.parked).await;
        self.wake.notify_one();
    }

    async fn drop_surplus(&self) {
        loop {
            let entry = {
                let mut entries = self.entries();
                let target = self.target.load(Ordering::Relaxed) as usize;
                if entries.len() > target { entries.pop_back() } else { None }
            };
            let Some(entry) = entry else { return };
            entry.watcher.abort();
            live::changed();
            self.destroy(entry.parked).await;
        }
    }

    async fn destroy_all(&self) {
        loop {
            let Some(entry) = self.entries().pop_back() else { return };
            entry.watcher.abort();
            self.destroy(entry.parked).await;
        }
    }

    async fn destroy(&self, parked: Parked) {
        let id = parked.inner.id.clone();
        parked.inner.machine.destroy().await;
        if let Err(e) = self.context.db.vm_gone(&id).await {
            tracing::error!(vm = %id, "{e}");
        }
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, VecDeque<Entry>> {
        self.ready.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Claims come first: they are short, and a restore's start would take the CPU from them. Under
/// claims without end a restore is what they need.
pub(super) async fn let_claims_go_first(claims: &watch::Receiver<u32>) {
    let mut claims = claims.clone();
    let quiet = async {
        while claims.wait_for(|under_way| *under_way == 0).await.is_ok() {
            tokio::time::sleep(HEADWAY).await;
            if *claims.borrow() == 0 {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(MOST_HEADWAY, quiet).await;
}
