//! One user id per jailed VM, so that a guest that breaks out of its VM owns nothing of another's.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};

/// Above what systemd gives to containers and below where ids become negative numbers.
const FIRST: u32 = 1_900_000_000;
const COUNT: u32 = 1 << 16;

/// The ids that are free.
#[derive(Debug, Clone, Default)]
pub(super) struct UidPool(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    used: BTreeSet<u32>,
    next: u32,
}

/// An id that nothing else on this host runs as. It is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Uid {
    number: u32,
    pool: UidPool,
}

impl UidPool {
    /// A pool in which the ids of processes that run already, such as VMs of an earlier service, are
    /// taken.
    pub(super) fn new() -> Self {
        let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let used = pids
            .filter_map(|entry| entry.metadata().ok())
            .map(|meta| meta.uid())
            .filter(|uid| (FIRST..FIRST + COUNT).contains(uid))
            .collect();
        Self(Arc::new(Mutex::new(State { used, next: 0 })))
    }

    /// An id that is free, and that was not used for as long as possible.
    pub(super) fn take(&self) -> Option<Uid> {
        let mut state = self.state();
        let start = state.next;
        let free = (0..COUNT)
            .map(|i| (start + i) % COUNT)
            .find(|offset| !state.used.contains(&(FIRST + offset)))?;
        state.next = (free + 1) % COUNT;
        state.used.insert(FIRST + free);
        Some(Uid { number: FIRST + free, pool: self.clone() })
    }

    /// The id of a VM that runs already.
    pub(super) fn adopt(&self, number: u32) -> Uid {
        self.state().used.insert(number);
        Uid { number, pool: self.clone() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Uid {
    pub(super) fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for Uid {
    fn drop(&mut self) {
        self.pool.state().used.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_and_come_back_late() {
        let pool = UidPool::default();
        let a = pool.take().unwrap();
        let b = pool.take().unwrap();
        assert_ne!(a.number(), b.number());
        let was = a.number();
        drop(a);
        assert_ne!(pool.take().unwrap().number(), was, "an id is not used again at once");
        let adopted = pool.adopt(FIRST + 2);
        let all: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(all.len() as u32, COUNT - 2);
        assert!(all.iter().all(|u| u.number() != adopted.number() && u.number() != b.number()));
        drop(all);
        assert!(pool.take().is_some());
    }
}
