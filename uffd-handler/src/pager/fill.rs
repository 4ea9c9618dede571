//! Puts pages in place ahead of demand: the working set first, everything when the VM graduates.
//!
//! Runs on a thread of its own. Demand always goes first, and nobody is woken: whoever waits for a
//! page has a message in the fault thread's queue, which finds the page present and wakes them. A
//! page that cannot be read here is left for the fault thread to judge.

use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::session::Session;
use crate::fdpass;
use crate::region::Unit;
use crate::source::{PageKind, RunKind};
use crate::stats::Counter;
use crate::uffd::{Fill, FillStop, HUGE_PAGE, PAGE};

/// Pages per install when nobody waits, and when somebody just did.
const MAX_BATCH: u64 = HUGE_PAGE / PAGE;
const SMALL_BATCH: u64 = 64;
/// Longest time that one batch stands back for demand.
const STAND_BACK: Duration = Duration::from_millis(1);
/// How long a VMM that is changing its mappings is waited for.
const AGAIN_DEADLINE: Duration = Duration::from_secs(5);
/// Part of the time that graduation pauses: it is never urgent.
const GRADUATION_PAUSE_FACTOR: u32 = 3;

/// Why filling ended before its time.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unfilled {
    /// The VM is gone or not ours any more.
    Over,
    /// Something that the fault thread will meet too, should it matter.
    Failed(String),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    WorkingSet,
    Graduation,
}

/// Puts the working set in place, then graduates the VM if that is wanted; whether it has.
pub(super) fn fill(session: &Session) -> Result<bool, Unfilled> {
    if session.state.is_graduated() {
        // By a page server that may not have lived to say so.
        session.state.set_prefetched();
        return Ok(session.graduate_after_millis.is_some());
    }
    let mut filler = Filler { session, buffer: Vec::new() };
    let replayed = filler.working_set();
    session.state.set_prefetched();
    replayed?;
    let Some(after) = session.graduate_after_millis else { return Ok(false) };
    let end = Instant::now() + Duration::from_millis(after);
    if fdpass::wait_for(session.stop.as_fd(), PollFlags::POLLIN, end) != Ok(false) {
        return Err(Unfilled::Over);
    }
    filler.graduate()?;
    Ok(true)
}

/// Graduates the VM, now, unless it has.
pub(super) fn graduate(session: &Session) -> Result<bool, Unfilled> {
    if !session.state.is_graduated() {
        Filler { session, buffer: Vec::new() }.graduate()?;
    }
    Ok(true)
}

struct Filler<'a> {
    session: &'a Session,
    /// Allocated when the first page has to be read.
    buffer: Vec<u8>,
}

impl Filler<'_> {
    fn working_set(&mut self) -> Result<(), Unfilled> {
        let Some(set) = &self.session.working_set else { return Ok(()) };
        for run in set.runs() {
            self.session.layers.will_need(run);
        }
        for run in set.runs() {
            self.pages(run, Purpose::WorkingSet)?;
        }
        Ok(())
    }

    fn graduate(&mut self) -> Result<(), Unfilled> {
        self.pages(0..self.session.state.pages(), Purpose::Graduation)?;
        self.check_unchanged()?;
        // Only a page that was in place once or was given back may be left to the kernel now.
        let state = &self.session.state;
        let mut from = 0;
        while let Some(page) = state.present().next(from, state.pages(), false) {
            if !state.removed().get(page) {
                return Err(Unfilled::Failed(format!("page {page} is still missing")));
            }
            from = page + 1;
        }
        // Noted first: a page server that takes over in between has nothing to serve either.
        state.set_graduated();
        for region in self.session.regions.regions() {
            if let Err(error) = self.session.uffd.unregister(region.base, region.size) {
                return Err(Unfilled::Failed(format!("unregister: {error}")));
            }
        }
        Ok(())
    }

    fn pages(&mut self, pages: Range<u64>, purpose: Purpose) -> Result<(), Unfilled> {
        let state = &self.session.state;
        let mut page = pages.start;
        while let Some(start) = state.present().next(page, pages.end, false) {
            let began = Instant::now();
            let batch = self.stand_back()?;
            self.check_unchanged()?;
            let end = pages.end.min(start + batch);
            let end = state.present().next(start, end, true).unwrap_or(end);
            page = self.batch(start..end, purpose)?;
            if purpose == Purpose::Graduation {
                let pause = Instant::now() + began.elapsed() * GRADUATION_PAUSE_FACTOR;
                if fdpass::wait_for(self.session.stop.as_fd(), PollFlags::POLLIN, pause)
                    != Ok(false)
                {
                    return Err(Unfilled::Over);
                }
            }
        }
        Ok(())
    }

    fn check_unchanged(&self) -> Result<(), Unfilled> {
        self.session.layers.check_unchanged().map_err(|error| Unfilled::Failed(error.to_string()))
    }

    /// Lets demand go first; says how many pages the next batch may have.
    fn stand_back(&self) -> Result<u64, Unfilled> {
        if self.session.is_stopping() || self.session.is_peer_gone() {
            return Err(Unfilled::Over);
        }
        if !self.session.has_demand() {
            return Ok(MAX_BATCH);
        }
        let until = Instant::now() + STAND_BACK;
        while self.session.has_demand() && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(30));
        }
        Ok(SMALL_BATCH)
    }

    /// Installs pages from the start of the range on; returns where to go on.
    fn batch(&mut self, pages: Range<u64>, purpose: Purpose) -> Result<u64, Unfilled> {
        let session = self.session;
        let Some(region) = session.regions.region_of_page(pages.start) else {
            return Err(Unfilled::Failed(format!("no region has page {}", pages.start)));
        };
        let address = region.base + (pages.start * PAGE - region.offset);
        if region.page_size > PAGE {
            return match session.regions.unit_at(address) {
                Some(unit) => self.huge(unit, purpose),
                None => Err(Unfilled::Failed(format!("no unit at {address:#x}"))),
            };
        }
        let in_region = (region.offset + region.size) / PAGE;
        let run = session.layers.run(pages.start, pages.end.min(in_region) - pages.start);
        let source = match run.kind {
            RunKind::Read { layer, place } => {
                self.buffer.resize((MAX_BATCH * PAGE) as usize, 0);
                let room = &mut self.buffer[..(run.pages * PAGE) as usize];
                session
                    .layers
                    .read_run(layer, place, pages.start, room)
                    .map_err(|error| Unfilled::Failed(error.to_string()))?;
                Some(self.buffer.as_ptr())
            }
            RunKind::Mapped(from) => {
                // Reading from disk happens here, and not with the fault thread locked out.
                session
                    .layers
                    .populate(pages.start, run.pages)
                    .map_err(|error| Unfilled::Failed(error.to_string()))?;
                Some(from)
            }
            RunKind::Zero => None,
        };
        self.install(address, pages.start, run.pages, source, purpose)
    }

    fn huge(&mut self, unit: Unit, purpose: Purpose) -> Result<u64, Unfilled> {
        self.buffer.resize((MAX_BATCH * PAGE) as usize, 0);
        let room = &mut self.buffer[..(unit.pages * PAGE) as usize];
        let kind = self
            .session
            .read_unit(unit, room)
            .map_err(|error| Unfilled::Failed(error.to_string()))?;
        if kind == PageKind::Zero {
            room.fill(0);
        }
        let source = Some(self.buffer.as_ptr());
        self.install(unit.address, unit.page, unit.pages, source, purpose)
    }

    /// One install under the lock; `source` of nothing means zeros.
    fn install(
        &self,
        address: u64,
        first: u64,
        count: u64,
        source: Option<*const u8>,
        purpose: Purpose,
    ) -> Result<u64, Unfilled> {
        let session = self.session;
        let began = Instant::now();
        let fill = loop {
            let lock = session.install_lock();
            let removed = session.state.removed().next(first, first + count, true);
            let len = removed.map_or(count, |page| page - first) * PAGE;
            if len == 0 {
                // Given back: it reads as zeros when somebody asks. On to the one behind it.
                return Ok(first + self.step(first));
            }
            let fill = match source {
                None => session.uffd.zeropage(address, len, false),
                // SAFETY: the source is our buffer or a mapping of a whole memory file, both
                // longer than `count` pages from there and alive as long as the session.
                Some(source) => unsafe { session.uffd.copy(address, source, len, false) },
            };
            drop(lock);
            if fill.stop != Some(FillStop::Again) || began.elapsed() > AGAIN_DEADLINE {
                break fill;
            }
            if session.is_stopping() || session.is_peer_gone() {
                return Err(Unfilled::Over);
            }
            std::thread::sleep(Duration::from_micros(200));
        };
        self.outcome(first, fill, source.is_none(), purpose)
    }

    /// Pages of the memory file in one page of the VMM's mapping there.
    fn step(&self, page: u64) -> u64 {
        self.session.regions.region_of_page(page).map_or(1, |region| region.page_size / PAGE)
    }

    fn outcome(
        &self,
        first: u64,
        fill: Fill,
        zero: bool,
        purpose: Purpose,
    ) -> Result<u64, Unfilled> {
        let state = &self.session.state;
        match fill.stop {
            None => {
                let pages = fill.installed / PAGE;
                state.present().set_range(first..first + pages);
                match purpose {
                    Purpose::WorkingSet => {
                        state.count(Counter::Prefetched, pages);
                        state.count(Counter::PrefetchedZero, if zero { pages } else { 0 });
                    }
                    Purpose::Graduation => state.count(Counter::Filled, pages),
                }
                state.count(Counter::BytesCopied, if zero { 0 } else { fill.installed });
                Ok(first + pages)
            }
            Some(FillStop::Exists) => {
                let next = first + self.step(first);
                state.present().set_range(first..next);
                Ok(next)
            }
            Some(FillStop::VmGone) => Err(Unfilled::Over),
            Some(stop) => Err(Unfilled::Failed(format!("page {first}: {stop:?}"))),
        }
    }
}
