//! The VMs that the supervisor vouches for.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use super::recovery;
use crate::control::Registration;
use crate::stats::Stats;
use crate::vm_state::VmState;

/// One VM: what a page server needs, held a second time.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) registration: Registration,
    pub(super) fds: Vec<OwnedFd>,
    pub(super) state: Arc<VmState>,
    /// Why it is not served any more.
    pub(super) lost: Option<String>,
    /// It was told that all pages are in place.
    pub(super) graduated: bool,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    state_dir: Option<PathBuf>,
    vms: HashMap<String, Entry>,
    ended: Stats,
}

impl Table {
    /// An empty table; VMs that leave it are removed from the state directory too.
    pub(super) fn new(state_dir: Option<PathBuf>) -> Self {
        Self { state_dir, ..Self::default() }
    }

    /// Adds a VM; false when its name is taken.
    pub(super) fn insert(&mut self, entry: Entry) -> bool {
        let id = entry.registration.id.clone();
        if self.vms.contains_key(&id) {
            return false;
        }
        self.vms.insert(id, entry);
        true
    }

    /// Forgets a VM but for its counts; false when there was none.
    pub(super) fn remove(&mut self, id: &str) -> bool {
        let Some(entry) = self.vms.remove(id) else { return false };
        self.ended.add(&entry.state.stats());
        if let Some(dir) = &self.state_dir {
            recovery::forget(dir, id);
        }
        true
    }

    pub(super) fn ids(&self) -> Vec<String> {
        self.vms.keys().cloned().collect()
    }

    pub(super) fn state(&self, id: &str) -> Option<Arc<VmState>> {
        self.vms.get(id).map(|entry| entry.state.clone())
    }

    /// Notes that a VM is to have all its pages put in place, by the next page server too; false
    /// when there is no such VM.
    pub(super) fn graduate(&mut self, id: &str) -> bool {
        let Some(entry) = self.vms.get_mut(id) else { return false };
        entry.registration.graduate_after_millis = Some(0);
        if let Some(dir) = &self.state_dir
            && let Err(error) = recovery::record(dir, entry)
        {
            // Only a service and a page server that die both now would forget it.
            tracing::warn!(vm = id, %error, "noting that a VM graduates");
        }
        true
    }

    /// Notes which request a VM is used for; false when there is no such VM. What is written down
    /// stays as it is: a log line is not worth a file.
    pub(super) fn claim(&mut self, id: &str, request: &str) -> bool {
        let Some(entry) = self.vms.get_mut(id) else { return false };
        entry.registration.request = Some(request.to_owned());
        true
    }

    /// Notes that all pages of a VM are in place; false when that is no news: page servers one after
    /// another may say so.
    pub(super) fn set_graduated(&mut self, id: &str) -> bool {
        let entry = self.vms.get_mut(id);
        entry.is_some_and(|entry| !std::mem::replace(&mut entry.graduated, true))
    }

    pub(super) fn lost(&self, id: &str) -> Option<String> {
        self.vms.get(id).and_then(|entry| entry.lost.clone())
    }

    pub(super) fn set_lost(&mut self, id: &str, reason: &str) {
        if let Some(entry) = self.vms.get_mut(id) {
            entry.lost = Some(reason.into());
        }
    }

    /// The descriptors that go with a VM's registration.
    pub(super) fn descriptors(&self, id: &str) -> Vec<BorrowedFd<'_>> {
        self.vms.get(id).map_or(Vec::new(), |entry| entry.fds.iter().map(AsFd::as_fd).collect())
    }

    /// A VM's registration with copies of what is attached to it.
    pub(super) fn attached(
        &self,
        id: &str,
    ) -> Option<std::io::Result<(Registration, Vec<OwnedFd>)>> {
        let entry = self.vms.get(id)?;
        let attached = entry.fds[Registration::FIXED_FDS..].iter();
        let copies: std::io::Result<_> = attached.map(OwnedFd::try_clone).collect();
        Some(copies.map(|copies| (entry.registration.clone(), copies)))
    }

    /// VMs that a new page server has to take over.
    pub(super) fn served(&self) -> impl Iterator<Item = &Registration> {
        self.vms.values().filter(|entry| entry.lost.is_none()).map(|entry| &entry.registration)
    }

    /// Counts of all VMs there are and were.
    pub(super) fn total(&self) -> Stats {
        let mut total = self.ended.clone();
        self.vms.values().for_each(|entry| total.add(&entry.state.stats()));
        total
    }
}
