//! Waiting for the next fault without sleeping, for a little while after a restore.
//!
//! A guest that thaws asks for page after page, and most of the time a fault takes is spent on
//! putting this thread to sleep and waking it. Not sleeping saves two thirds of it, and takes a
//! processor from the guests. So it is done only between faults that follow close upon each other,
//! for a limited time per VM, and by few threads at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Threads of this process that wait without sleeping now.
static SPINNING: AtomicUsize = AtomicUsize::new(0);

/// How a page server waits for faults.
#[derive(Clone, Copy, Debug)]
pub struct SpinPolicy {
    /// Longest wait without sleeping after a fault; zero turns it off.
    pub window: Duration,
    /// Time a VM may spend on it in one burst of activity.
    pub budget: Duration,
    /// Quiet time after which a VM gets its budget again.
    pub refill_after: Duration,
    /// Threads that may do it at once.
    pub threads: usize,
}

impl SpinPolicy {
    /// For this machine: at most one thread per two processors, none on a single one.
    pub fn for_this_machine(window: Duration) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            window,
            budget: Duration::from_millis(100),
            refill_after: Duration::from_secs(1),
            threads: processors / 2,
        }
    }
}

/// One VM's account.
pub(super) struct Spin {
    policy: SpinPolicy,
    left: Duration,
    last_fault: Option<Instant>,
}

impl Spin {
    pub(super) fn new(policy: SpinPolicy) -> Self {
        Self { policy, left: policy.budget, last_fault: None }
    }

    /// A fault was answered just now.
    pub(super) fn fault(&mut self, now: Instant) {
        if self.last_fault.is_some_and(|last| now - last > self.policy.refill_after) {
            self.left = self.policy.budget;
        }
        self.last_fault = Some(now);
    }

    /// Calls until there is something or the time is up; true when there is something.
    pub(super) fn wait(&mut self, mut is_ready: impl FnMut() -> bool) -> bool {
        let began = Instant::now();
        let Some(last) = self.last_fault else { return false };
        let end = (last + self.policy.window).min(began + self.left);
        if began >= end || SPINNING.fetch_add(1, Ordering::Relaxed) >= self.policy.threads {
            if began < end {
                SPINNING.fetch_sub(1, Ordering::Relaxed);
            }
            return false;
        }
        let mut now = began;
        let mut found = false;
        while !found && now < end {
            std::hint::spin_loop();
            found = is_ready();
            now = Instant::now();
        }
        SPINNING.fetch_sub(1, Ordering::Relaxed);
        self.left = self.left.saturating_sub(now - began);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_sleep_is_limited() {
        let policy = SpinPolicy {
            window: Duration::from_millis(5),
            budget: Duration::from_millis(12),
            refill_after: Duration::from_secs(100),
            threads: 1,
        };
        let mut spin = Spin::new(policy);
        assert!(!spin.wait(|| true), "nothing asked for anything yet");
        let began = Instant::now();
        let mut waits = 0;
        loop {
            spin.fault(Instant::now());
            let before = Instant::now();
            assert!(!spin.wait(|| false));
            if before.elapsed() < Duration::from_micros(100) {
                break;
            }
            waits += 1;
            assert!(waits < 100, "the budget ends");
        }
        assert!(began.elapsed() >= Duration::from_millis(12));
        // A busy machine may stretch one wait over all of it.
        assert!(waits >= 1);
    }
}
