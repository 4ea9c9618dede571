//! Answers one fault: finds what the page holds and puts it in place.

use std::time::Duration;

use super::session::{End, Session};
use crate::region::Unit;
use crate::source::{PageKind, SourceError};
use crate::stats::Counter;
use crate::uffd::{FillStop, HUGE_PAGE, PAGE};

/// How often a failed read of a saved page is tried again, and how long apart.
const SOURCE_RETRIES: u32 = 5;
const SOURCE_RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Room for one page of the largest size in use.
pub(super) struct PageBuffer(Vec<u8>);

impl PageBuffer {
    /// For the pages of this VM.
    pub(super) fn new(session: &Session) -> Self {
        let largest = session.regions.regions().iter().map(|region| region.page_size).max();
        Self(vec![0; largest.unwrap_or(HUGE_PAGE) as usize])
    }
}

/// Outcome of one attempt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The page is in place and its waiters are awake.
    Served,
    /// Not now: the VMM is changing its mappings.
    Later,
    /// Not now: there is no memory.
    NoMemory,
    /// The VM cannot be served any longer.
    End(End),
}

impl Session {
    /// Puts the page of a demand fault in place.
    pub(super) fn answer(&self, unit: Unit, write: bool, buffer: &mut PageBuffer) -> Answer {
        let buffer = &mut buffer.0[..(unit.pages * PAGE) as usize];
        // A page that was in place once and is missing again was given back, whether or not the
        // message that says so has been read.
        let removed = self.state.removed().get(unit.page) || self.state.present().get(unit.page);
        let kind = if removed { Ok(PageKind::Zero) } else { self.read_unit(unit, buffer) };
        let kind = match kind {
            Ok(kind) => kind,
            Err(error) => return Answer::End(End::Lost(error.to_string())),
        };
        let len = unit.pages * PAGE;
        let fill = match kind {
            // The shared zero page is enough for a reader. A writer would fault once more.
            PageKind::Zero if !write && unit.pages == 1 => {
                self.uffd.zeropage(unit.address, len, true)
            }
            kind => {
                if kind == PageKind::Zero {
                    buffer.fill(0);
                }
                // SAFETY: the buffer is `len` bytes long and lives through the call.
                unsafe { self.uffd.copy(unit.address, buffer.as_ptr(), len, true) }
            }
        };
        match fill.stop {
            None => {
                self.state.present().set_range(unit.page..unit.page + unit.pages);
                let counter = match (removed, kind) {
                    (true, _) => Counter::FaultsRemoved,
                    (false, PageKind::Zero) => Counter::FaultsZero,
                    (false, PageKind::Data) => Counter::FaultsData,
                };
                self.state.count(counter, 1);
                if kind == PageKind::Data {
                    self.state.count(Counter::BytesCopied, fill.installed);
                }
            }
            Some(FillStop::Exists) => {
                self.state.present().set_range(unit.page..unit.page + unit.pages);
                // Whoever put it there may have left the waking to us.
                if self.uffd.wake(unit.address, len).is_err() && self.is_peer_gone() {
                    return Answer::End(End::Gone);
                }
                self.state.count(Counter::FaultsPresent, 1);
            }
            Some(FillStop::Again) => return Answer::Later,
            Some(FillStop::NoMemory) => return Answer::NoMemory,
            Some(FillStop::VmGone) => return Answer::End(End::Gone),
            Some(FillStop::NoMapping) => {
                let what = format!("guest memory at {:#x} is not mapped any more", unit.address);
                return Answer::End(self.end_without_mapping(&what));
            }
            Some(stop) => {
                let what = format!("page {} at {:#x}: {stop:?}", unit.page, unit.address);
                return Answer::End(End::Lost(what));
            }
        }
        self.note_demand(unit, write);
        Answer::Served
    }

    fn note_demand(&self, unit: Unit, write: bool) {
        self.state.count(Counter::FaultsWrite, u64::from(write));
        if let Some(set) = &self.working_set {
            let late = set.contains(unit.page);
            let counter = if late { Counter::WorkingSetLate } else { Counter::WorkingSetMiss };
            self.state.count(counter, 1);
        }
        if self.state.is_recording() {
            self.state.recorded().set_range(unit.page..unit.page + unit.pages);
        }
    }

    /// Reads a page as the VMM maps it; a huge one is made of small ones from any layers.
    pub(super) fn read_unit(&self, unit: Unit, buffer: &mut [u8]) -> Result<PageKind, SourceError> {
        let mut whole = PageKind::Zero;
        for (i, part) in buffer.chunks_exact_mut(PAGE as usize).enumerate() {
            match self.read_page(unit.page + i as u64, part)? {
                PageKind::Data => whole = PageKind::Data,
                PageKind::Zero if unit.pages > 1 => part.fill(0),
                PageKind::Zero => {}
            }
        }
        Ok(whole)
    }

    fn read_page(&self, page: u64, buffer: &mut [u8]) -> Result<PageKind, SourceError> {
        let mut tries = 0;
        loop {
            match self.layers.read_page(page, buffer) {
                Err(error) if error.is_transient() && tries < SOURCE_RETRIES => {
                    tracing::warn!(vm = self.id, %error, tries, "reading a saved page");
                    self.state.count(Counter::SourceRetries, 1);
                    std::thread::sleep(SOURCE_RETRY_PAUSE);
                    tries += 1;
                }
                outcome => return outcome,
            }
        }
    }
}
