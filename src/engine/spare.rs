//! One spawned VMM that has loaded nothing yet, for each pool that is in use: a claim that finds the
//! pool empty does not wait for a process to start and for its working set to be put in place.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use snapshotter::vmm::Priority;

use super::context::RestoreContext;
use super::lifecycle::Spawned;
use super::pool::let_claims_go_first;
use super::template::ReadyTemplate;

/// Pause after a spawn that failed; the claim that needs it makes its own attempt and says why.
const RETRY: Duration = Duration::from_secs(5);

/// The spare.
#[derive(Debug, Default)]
pub(super) struct Spare {
    slot: Mutex<Option<Spawned>>,
    changed: Notify,
    closed: AtomicBool,
}

impl Spare {
    /// Takes it, if it is there.
    pub(super) fn take(&self) -> Option<Spawned> {
        let spawned = self.lock().take();
        self.changed.notify_one();
        spawned
    }

    /// Has [`Spare::keep`] ask again for how long it is wanted.
    pub(super) fn look_again(&self) {
        self.changed.notify_one();
    }

    /// Ends [`Spare::keep`].
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.changed.notify_one();
    }

    /// Makes a new one whenever it was taken, for as long as `wanted` says, until closed; then gives
    /// the last one up.
    pub(super) async fn keep(
        &self,
        context: &RestoreContext,
        template: &ReadyTemplate,
        claims: watch::Receiver<u32>,
        wanted: impl Fn() -> Duration,
    ) {
        while !self.closed.load(Ordering::Relaxed) {
            let wanted_for = wanted();
            if wanted_for.is_zero() {
                self.give_up().await;
                self.changed.notified().await;
                continue;
            }
            let empty = self.lock().is_none();
            if empty {
                let_claims_go_first(&claims).await;
                match Spawned::spawn(context, template, Priority::Background).await {
                    Ok(spawned) => *self.lock() = Some(spawned),
                    Err(e) => {
                        tracing::warn!(template = %template.name, "no spare: {e}");
                        tokio::time::sleep(RETRY).await;
                        continue;
                    }
                }
            }
            // Either way it is looked at again.
            let _ = tokio::time::timeout(wanted_for, self.changed.notified()).await;
        }
        self.give_up().await;
    }

    async fn give_up(&self) {
        let last = self.lock().take();
        if let Some(spawned) = last {
            spawned.discard().await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Spawned>> {
        self.slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
