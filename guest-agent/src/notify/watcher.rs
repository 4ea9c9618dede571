//! Watchers that note events down until they are asked for.

use super::tree::Tree;
use crate::server::ApiError;
use crate::wire::{WatchEvent, WatchKind, WatchRequest, codes};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use tokio::task::AbortHandle;

/// Watchers at once.
const MAX_WATCHERS: usize = 64;
/// Events one of them keeps; the oldest give way, and the client is told.
const MAX_EVENTS: usize = 10_000;

#[derive(Debug, Default)]
struct Noted {
    events: VecDeque<WatchEvent>,
    lost: bool,
}

impl Noted {
    fn add(&mut self, events: Vec<WatchEvent>) {
        self.events.extend(events);
        while self.events.len() > MAX_EVENTS {
            self.events.pop_front();
            self.lost = true;
        }
    }

    fn take(&mut self) -> Vec<WatchEvent> {
        let lost = std::mem::take(&mut self.lost);
        let lost = lost.then(|| WatchEvent::of(String::new(), WatchKind::Overflow));
        lost.into_iter().chain(self.events.drain(..)).collect()
    }
}

#[derive(Debug)]
struct Watcher {
    noted: Rc<RefCell<Noted>>,
    follows: AbortHandle,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.follows.abort();
    }
}

/// The watchers there are, by id.
#[derive(Debug, Default)]
pub struct Watchers {
    all: RefCell<BTreeMap<String, Watcher>>,
}

fn unknown(id: &str) -> ApiError {
    ApiError::new(404, codes::WATCHER_NOT_FOUND, format!("there is no watcher {id:?}"))
}

impl Watchers {
    /// Starts one; returns its id.
    ///
    /// # Errors
    /// As [`Tree::new`], and 429 when there are too many.
    pub fn add(&self, request: &WatchRequest) -> Result<String, ApiError> {
        if self.all.borrow().len() >= MAX_WATCHERS {
            let text = format!("{MAX_WATCHERS} watchers are there already; remove one first");
            return Err(ApiError::new(429, codes::TOO_MANY_WATCHES, text));
        }
        let mut tree = Tree::new(request)?;
        let mut random = [0u8; 8];
        crate::random::fill(&mut random)?;
        let id = hex::encode(random);
        let noted = Rc::new(RefCell::new(Noted::default()));
        let notes = Rc::clone(&noted);
        let follow = async move {
            while let Ok(events) = tree.next().await {
                notes.borrow_mut().add(events);
            }
        };
        let follows = tokio::task::spawn_local(follow).abort_handle();
        self.all.borrow_mut().insert(id.clone(), Watcher { noted, follows });
        Ok(id)
    }

    /// What happened since this was last asked.
    ///
    /// # Errors
    /// 404 `watcher_not_found`.
    pub fn take(&self, id: &str) -> Result<Vec<WatchEvent>, ApiError> {
        let all = self.all.borrow();
        let watcher = all.get(id).ok_or_else(|| unknown(id))?;
        Ok(watcher.noted.borrow_mut().take())
    }

    /// Ends one.
    ///
    /// # Errors
    /// 404 `watcher_not_found`.
    pub fn remove(&self, id: &str) -> Result<(), ApiError> {
        self.all.borrow_mut().remove(id).map(drop).ok_or_else(|| unknown(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_events_are_told_once() {
        let mut noted = Noted::default();
        let event = |n: usize| WatchEvent::of(n.to_string(), WatchKind::Write);
        noted.add((0..MAX_EVENTS + 2).map(event).collect());
        let taken = noted.take();
        assert_eq!(taken[0].kind, WatchKind::Overflow);
        assert_eq!((taken[1].name.as_str(), taken.len()), ("2", MAX_EVENTS + 1));
        assert_eq!(noted.take(), []);
    }
}
