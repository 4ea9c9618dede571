//! Life times: one ordered set of deadlines, one task that sleeps until the first.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::sandbox::{OnTimeout, State};
use super::{Engine, TransitionError};

/// When a sandbox that could not be paused at its expiry is tried again.
const PAUSE_RETRY: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Deadlines {
    ordered: BTreeSet<(Instant, String)>,
    by_id: HashMap<String, Instant>,
}

/// The deadlines of all sandboxes.
#[derive(Debug, Default)]
pub(super) struct Expiries {
    deadlines: Mutex<Deadlines>,
    changed: Notify,
    closed: AtomicBool,
}

impl Expiries {
    fn lock(&self) -> std::sync::MutexGuard<'_, Deadlines> {
        self.deadlines.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Sets or replaces a sandbox's deadline.
    pub(super) fn set(&self, id: &str, at: Instant) {
        let mut deadlines = self.lock();
        if let Some(old) = deadlines.by_id.insert(id.to_owned(), at) {
            deadlines.ordered.remove(&(old, id.to_owned()));
        }
        deadlines.ordered.insert((at, id.to_owned()));
        drop(deadlines);
        self.changed.notify_one();
    }

    /// Forgets a sandbox's deadline.
    pub(super) fn clear(&self, id: &str) {
        let mut deadlines = self.lock();
        if let Some(old) = deadlines.by_id.remove(id) {
            deadlines.ordered.remove(&(old, id.to_owned()));
        }
    }

    /// Ends [`Engine::expire_sandboxes`].
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.changed.notify_one();
    }

    fn first(&self) -> Option<Instant> {
        self.lock().ordered.first().map(|(at, _)| *at)
    }

    fn take_due(&self, now: Instant) -> Option<String> {
        let mut deadlines = self.lock();
        if deadlines.ordered.first()?.0 > now {
            return None;
        }
        let (_, id) = deadlines.ordered.pop_first()?;
        deadlines.by_id.remove(&id);
        Some(id)
    }
}

impl Engine {
    /// Ends each sandbox when its time is up, until the engine shuts down.
    pub(super) async fn expire_sandboxes(self: Arc<Self>) {
        while !self.expiries.closed.load(Ordering::Relaxed) {
            let sleep = async {
                match self.expiries.first() {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = sleep => {}
                () = self.expiries.changed.notified() => {}
            }
            while let Some(id) = self.expiries.take_due(Instant::now()) {
                let engine = Arc::clone(&self);
                self.spawn(async move { engine.expire(&id).await });
            }
        }
    }

    async fn expire(self: Arc<Self>, id: &str) {
        let Ok(sandbox) = self.sandbox(id) else { return };
        // It was used since, or its time was changed.
        let ends_at = sandbox.ends_at();
        if ends_at > Instant::now() {
            self.expiries.set(id, ends_at);
            return;
        }
        if sandbox.data().on_timeout == OnTimeout::Pause {
            match self.pause(id).await {
                Ok(_) => return,
                // It is paused or deleted already; what comes next sets the next deadline.
                Err(TransitionError::Sandbox(e)) => {
                    return tracing::debug!(sandbox = id, "pause at expiry: {e}");
                }
                Err(e) => tracing::error!(sandbox = id, "pause at expiry: {e}"),
            }
            // Not deleted: its user asked to keep it. It gets another try.
            self.expiries.set(id, Instant::now() + PAUSE_RETRY);
            return;
        }
        // Somebody may have paused it just now: then it has no end.
        if let Err(e) = self.remove(sandbox, "expired", Some(State::Running)).await {
            tracing::warn!(sandbox = id, "expiry: {e}");
        }
    }
}
