//! A template's warm pool: VMs with a proven identity, and the task that keeps their number up.
//!
//! Nothing here polls: a claim, a death, a changed target or a finished restore wakes the refill.
//! Refill runs at low priority and does not start a restore while a claim is under way.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tracing::Instrument;

use super::context::RestoreContext;
use super::ids;
use super::lifecycle::Spawned;
use super::parked::{self, Warm, WarmUp};
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
/// With so many being restored or parked, a pool starts no other restore.
const REFILL_CONCURRENCY: u32 = 2;
/// How long a VM runs before it is parked. What its kernel and services do every now and then would
/// else be done for the first time in the midst of its claim.
const SETTLE: Duration = Duration::from_millis(700);

#[derive(Debug)]
struct Entry {
    vm: Warm,
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
    // Restores and parkings under way.
    busy: AtomicU32,
    misses: AtomicU64,
    closed: watch::Sender<bool>,
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
    /// VMs on their way there. Those that have a proven identity can be claimed already.
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
            busy: AtomicU32::new(0),
            misses: AtomicU64::new(0),
            closed: watch::Sender::new(false),
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
        let busy = self.busy.load(Ordering::Relaxed);
        let entries = self.entries();
        let ready = entries.iter().filter(|e| e.vm.parked).count() as u32;
        PoolNumbers {
            target: self.target.load(Ordering::Relaxed),
            ready,
            restoring: busy + entries.len() as u32 - ready,
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

    /// Takes a VM, parked if there is one, or counts a miss.
    pub fn take(&self) -> Option<Warm> {
        *self.last_taken() = Some(Instant::now());
        let entry = {
            let mut entries = self.entries();
            let at = entries.iter().position(|e| e.vm.parked).unwrap_or(0);
            entries.remove(at)
        };
        live::changed();
        if let Some(entry) = entry {
            entry.watcher.abort();
            self.wake.notify_one();
            return Some(entry.vm);
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        metrics::counter!("rethaw_pool_misses_total", "template" => self.template.name.clone())
            .increment(1);
        self.wake.notify_one();
        self.spare.look_again();
        None
    }

    /// Takes the spawned VMM that waits for a claim that finds no VM.
    pub fn take_spare(&self) -> Option<Spawned> {
        let mut spawned = self.spare.take()?;
        spawned.wanted();
        Some(spawned)
    }

    fn put(self: &Arc<Self>, vm: Warm) {
        let process = Arc::clone(&vm.inner.machine.vm);
        let (pool, id) = (Arc::clone(self), vm.inner.id.clone());
        // The entry must be in before its watcher can look for it.
        let mut entries = self.entries();
        let watcher = tokio::spawn(async move {
            let reason = process.exited().await;
            drop(process);
            pool.remove_dead(&id, &reason.to_string()).await;
        });
        entries.push_back(Entry { vm, watcher: watcher.abort_handle() });
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
            if *self.closed.borrow() {
                break;
            }
            self.drop_surplus().await;
            while self.wants_more() {
                let (busy, wait) = (Busy::new(self), backoff);
                restores.spawn(async move { busy.restore_one(wait).await });
            }
            tokio::select! {
                () = self.wake.notified() => {}
                Some(done) = restores.join_next(), if !restores.is_empty() => {
                    backoff = match done {
                        Ok(true) => Duration::ZERO,
                        _ => (backoff * 2).clamp(Duration::from_millis(100), MAX_BACKOFF),
                    };
                }
            }
        }
        // A restore under way is finished and then destroyed: aborting it would leave its clean-up
        // to whoever drops the pieces.
        while restores.join_next().await.is_some() {}
        self.destroy_all().await;
    }

    /// Ends [`Pool::run`], which then destroys every parked VM.
    pub fn close(&self) {
        let _ = self.closed.send_replace(true);
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
        n.ready + n.restoring < n.target && self.busy.load(Ordering::Relaxed) < REFILL_CONCURRENCY
    }

    /// Lets a VM run for a while, unless it is claimed or the pool is closed before, and parks it.
    async fn settle(self: &Arc<Self>, id: &str) -> bool {
        let mut closed = self.closed.subscribe();
        if tokio::time::timeout(SETTLE, closed.wait_for(|closed| *closed)).await.is_ok() {
            return true;
        }
        let_claims_go_first(&self.claims).await;
        let busy = Busy::new(self);
        let Some(entry) = self.remove(id) else { return true };
        entry.watcher.abort();
        match entry.vm.park(&self.context).await {
            Ok(parked) => self.put(parked),
            Err(e) => {
                tracing::error!(template = %self.template.name, "parking: {e}");
                return false;
            }
        }
        drop(busy);
        true
    }

    fn remove(&self, id: &str) -> Option<Entry> {
        let mut entries = self.entries();
        let at = entries.iter().position(|e| e.vm.inner.id == id);
        at.and_then(|at| entries.remove(at))
    }

    async fn remove_dead(&self, id: &str, reason: &str) {
        let Some(entry) = self.remove(id) else { return };
        live::changed();
        tracing::warn!(vm = id, "warm VM {reason}; replacing it");
        metrics::counter!("rethaw_pool_deaths_total", "template" => self.template.name.clone())
            .increment(1);
        self.destroy(entry.vm).await;
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
            self.destroy(entry.vm).await;
        }
    }

    async fn destroy_all(&self) {
        loop {
            let Some(entry) = self.entries().pop_back() else { return };
            entry.watcher.abort();
            self.destroy(entry.vm).await;
        }
    }

    async fn destroy(&self, vm: Warm) {
        let id = vm.inner.id.clone();
        vm.inner.machine.destroy().await;
        if let Err(e) = self.context.db.vm_gone(&id).await {
            tracing::error!(vm = %id, "{e}");
        }
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, VecDeque<Entry>> {
        self.ready.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Something a pool has under way; when it is over the pool looks what is next.
struct Busy(Arc<Pool>);

impl Busy {
    fn new(pool: &Arc<Pool>) -> Self {
        pool.busy.fetch_add(1, Ordering::Relaxed);
        live::changed();
        Self(Arc::clone(pool))
    }

    /// Makes a VM that can be claimed, and stays with it until it is parked or taken.
    async fn restore_one(self, wait: Duration) -> bool {
        let pool = Arc::clone(&self.0);
        tokio::time::sleep(wait).await;
        let_claims_go_first(&pool.claims).await;
        let started = Instant::now();
        let warm_up = if pool.is_busy() { WarmUp::Claim } else { WarmUp::ClaimAndCommand };
        let template = &pool.template.name;
        // Named like a request, in all logs; and so the agent is asked just as it will be.
        let span = tracing::info_span!(log::REQUEST, id = %ids::new_id(), refill = %template);
        let restored = async {
            match parked::restore(&pool.context, &pool.template, warm_up).await {
                Ok(vm) => {
                    let id = vm.inner.id.clone();
                    pool.put(vm);
                    metrics::histogram!("rethaw_pool_refill_duration_seconds", "template" => template.clone())
                        .record(started.elapsed().as_secs_f64());
                    drop(self);
                    pool.settle(&id).await
                }
                Err(e) => {
                    tracing::error!(%template, "refill: {e}");
                    false
                }
            }
        };
        restored.instrument(span).await
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
        live::changed();
        self.0.wake.notify_one();
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
