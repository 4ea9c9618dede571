//! One spawned VMM per pool that has loaded nothing yet: a claim that finds the pool empty does not
//! wait for a process to start and for its working set to be put in place.

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
    taken: Notify,
    closed: AtomicBool,
}

impl Spare {
    /// Takes it, if it is there.
    pub(super) fn take(&self) -> Option<Spawned> {
        let spawned = self.lock().take();
        self.taken.notify_one();
        spawned
    }

    /// Ends [`Spare::keep`].
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.taken.notify_one();
    }

    /// Makes a new one whenever it was taken, until closed; then gives the last one up.
    pub(super) async fn keep(
        &self,
        context: &RestoreContext,
        template: &ReadyTemplate,
        claims: watch::Receiver<u32>,
    ) {
        while !self.closed.load(Ordering::Relaxed) {
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
            self.taken.notified().await;
        }
        let last = self.lock().take();
        if let Some(spawned) = last {
            spawned.discard().await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Spawned>> {
        self.slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
