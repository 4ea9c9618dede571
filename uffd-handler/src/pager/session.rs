//! What the threads of one VM share: its userfaultfd, its memory's layers and its state.

use std::io::PipeReader;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::region::RegionMap;
use crate::source::MemoryLayers;
use crate::uffd::PageFd;
use crate::vm_state::VmState;
use crate::working_set::WorkingSet;
use crate::{fdpass, stats::Counter};

/// Why a VM is served no longer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The VMM ended.
    Gone,
    /// The service asked for it.
    Stopped,
    /// A page could not be served.
    Lost(String),
}

/// One VM being served.
pub(super) struct Session {
    pub(super) id: String,
    pub(super) uffd: PageFd,
    pub(super) peer: OwnedFd,
    /// Events on `peer` that mean the VMM's end.
    pub(super) peer_end: PollFlags,
    pub(super) regions: RegionMap,
    pub(super) state: VmState,
    pub(super) layers: MemoryLayers,
    pub(super) working_set: Option<WorkingSet>,
    pub(super) graduate_after_millis: Option<u64>,
    /// Reads end-of-file when the VM is to be left alone.
    pub(super) stop: PipeReader,
    /// The fault thread has work in hand.
    pub(super) demand: AtomicBool,
    /// Held while messages are read and while pages are put in place ahead of demand: in between,
    /// no page may be given back, or its old contents would come up again. Not needed for a VMM
    /// that does not report what it gives back.
    install: Mutex<()>,
    reports_removes: bool,
}

impl Session {
    /// Puts a session together; `stop` reads end-of-file when it has to end.
    #[expect(clippy::too_many_arguments, reason = "the parts come from as many descriptors")]
    pub(super) fn new(
        id: String,
        uffd: PageFd,
        peer: OwnedFd,
        regions: RegionMap,
        state: VmState,
        layers: MemoryLayers,
        working_set: Option<WorkingSet>,
        graduate_after_millis: Option<u64>,
        stop: PipeReader,
    ) -> Self {
        let reports_removes = uffd.reports_removes();
        let peer_end = if is_pidfd(&peer) { PollFlags::POLLIN } else { PollFlags::POLLHUP };
        Self {
            id,
            uffd,
            peer,
            peer_end,
            regions,
            state,
            layers,
            working_set,
            graduate_after_millis,
            stop,
            demand: AtomicBool::new(false),
            install: Mutex::new(()),
            reports_removes,
        }
    }

    /// Excludes the reading of messages, where that matters.
    pub(super) fn install_lock(&self) -> Option<MutexGuard<'_, ()>> {
        // The lock guards no data, so a panic elsewhere leaves nothing half done.
        self.reports_removes.then(|| self.install.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads messages into the shared state; ranges given back are noted before anything else can
    /// happen. For the fault thread only.
    pub(super) fn read(&self) -> Result<usize, Errno> {
        let _lock = self.install_lock();
        let messages = self.state.messages();
        let count = match self.uffd.read(messages) {
            Ok(count) => count,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(errno) => return Err(errno),
        };
        let removes = self.state.note_removes(&messages[..count], &self.regions);
        self.state.count(Counter::Removes, removes);
        Ok(count)
    }

    /// Does again what a page server did with the last messages it read, should it have died over
    /// them: notes what was given back (nothing changes if that was done), and wakes whoever waits
    /// for any page, so that they ask again. Before anything is put in place.
    pub(super) fn take_over(&self) {
        self.state.note_removes(self.state.messages(), &self.regions);
        self.wake_all();
    }

    fn wake_all(&self) {
        for region in self.regions.regions() {
            if let Err(error) = self.uffd.wake(region.base, region.size) {
                tracing::debug!(vm = self.id, %error, "waking a whole region");
            }
        }
    }

    /// Whether the service asked to leave the VM alone.
    pub(super) fn is_stopping(&self) -> bool {
        has_events(&self.stop, PollFlags::POLLIN)
    }

    /// Whether the VMM has ended, as far as is known now.
    pub(super) fn is_peer_gone(&self) -> bool {
        has_events(&self.peer, self.peer_end)
    }

    /// What an install means that found no address space or no mapping: a VMM on its way out, or
    /// one that took away its guest's memory.
    pub(super) fn end_without_mapping(&self, what: &str) -> End {
        let soon = Instant::now() + std::time::Duration::from_millis(200);
        match fdpass::wait_for(self.peer.as_fd(), self.peer_end, soon) {
            Ok(true) => End::Gone,
            _ => End::Lost(what.to_string()),
        }
    }

    /// Whether somebody waits for a page right now.
    pub(super) fn has_demand(&self) -> bool {
        self.demand.load(Ordering::Relaxed) || has_events(&self.uffd, PollFlags::POLLIN)
    }
}

fn has_events(fd: &impl AsFd, events: PollFlags) -> bool {
    poll(&mut [PollFd::new(fd.as_fd(), events)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn is_pidfd(fd: &OwnedFd) -> bool {
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd));
    std::fs::read_link(Path::new(&link))
        .is_ok_and(|target| target.to_string_lossy().contains("pidfd"))
}
