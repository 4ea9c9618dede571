//! The fault thread of one VM.
//!
//! Reads what the kernel reports in batches, answers every fault, and puts aside those that cannot
//! be answered yet. Nothing is allocated per fault.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::answer::{Answer, PageBuffer};
use super::session::{End, Session};
use super::spin::{Spin, SpinPolicy};
use crate::region::Unit;
use crate::stats::Counter;
use crate::uffd::Message;
use crate::vm_state::MESSAGES;

/// Faults that wait for a second attempt. One more is woken instead and asks again by itself.
const MAX_PARKED: usize = 256;
/// First and longest pause before faults that were put aside are tried again.
const PARK_PAUSE: Duration = Duration::from_micros(200);
const MAX_PARK_PAUSE: Duration = Duration::from_millis(10);
/// How long missing memory is waited for.
const NO_MEMORY_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy)]
struct Parked {
    unit: Unit,
    write: bool,
    since: Instant,
}

/// Serves a VM until it ends.
pub(super) fn serve(session: &Session, spin: SpinPolicy) -> End {
    let mut turn = Turn {
        session,
        buffer: PageBuffer::new(session),
        parked: Vec::with_capacity(MAX_PARKED),
        pause: PARK_PAUSE,
        spin: Spin::new(spin),
        unhandled: 0,
    };
    loop {
        let end = match turn.work() {
            Ok(true) => None,
            Ok(false) => turn.wait(),
            Err(end) => Some(end),
        };
        if let Some(end) = end {
            session.demand.store(false, Ordering::Relaxed);
            return end;
        }
    }
}

struct Turn<'a> {
    session: &'a Session,
    buffer: PageBuffer,
    parked: Vec<Parked>,
    pause: Duration,
    spin: Spin,
    /// Messages that the wait has read already.
    unhandled: usize,
}

impl Turn<'_> {
    /// One batch; true when there may be more.
    fn work(&mut self) -> Result<bool, End> {
        let count = match std::mem::take(&mut self.unhandled) {
            0 => self.read()?,
            count => count,
        };
        if count == 0 && self.parked.is_empty() {
            return Ok(false);
        }
        let read_at = Instant::now();
        self.session.demand.store(true, Ordering::Relaxed);
        if count > 0 {
            // Once per batch: a file that somebody rewrote must not reach a guest.
            if let Err(error) = self.session.layers.check_unchanged() {
                return Err(End::Lost(error.to_string()));
            }
        }
        for message in self.session.state.messages().iter().take(count) {
            match message.decode() {
                Message::Fault { address, write } => self.fault(address, write, read_at)?,
                Message::Remove { .. } => {} // noted as it was read
                Message::Other(event) => {
                    return Err(End::Lost(format!("unexpected userfaultfd event {event:#x}")));
                }
            }
        }
        let before = self.parked.len();
        if before > 0 {
            self.retry()?;
        }
        self.session.demand.store(false, Ordering::Relaxed);
        if count > 0 {
            self.spin.fault(Instant::now());
        }
        if self.parked.len() < before || self.parked.is_empty() {
            self.pause = PARK_PAUSE;
        }
        Ok(count == MESSAGES)
    }

    fn read(&mut self) -> Result<usize, End> {
        self.session
            .read()
            .map_err(|errno| End::Lost(format!("reading the userfaultfd: {}", errno.desc())))
    }

    fn fault(&mut self, address: u64, write: bool, read_at: Instant) -> Result<(), End> {
        let Some(unit) = self.session.regions.unit_at(address) else {
            return Err(End::Lost(format!("fault at {address:#x}, outside of the guest's memory")));
        };
        match self.session.answer(unit, write, &mut self.buffer) {
            Answer::Served => {
                self.session.state.count_latency(read_at.elapsed().as_nanos() as u64);
                Ok(())
            }
            Answer::Later | Answer::NoMemory => {
                self.session.state.count(Counter::FaultsParked, 1);
                if self.parked.len() < MAX_PARKED {
                    self.parked.push(Parked { unit, write, since: read_at });
                } else if self.session.uffd.wake(unit.address, 1 << 12).is_err() {
                    tracing::debug!(vm = self.session.id, "waking a fault that found no place");
                }
                Ok(())
            }
            Answer::End(end) => Err(end),
        }
    }

    fn retry(&mut self) -> Result<(), End> {
        let mut i = 0;
        while i < self.parked.len() {
            let Parked { unit, write, since } = self.parked[i];
            match self.session.answer(unit, write, &mut self.buffer) {
                Answer::Served => {
                    self.session.state.count_latency(since.elapsed().as_nanos() as u64);
                    self.parked.swap_remove(i);
                }
                Answer::NoMemory if since.elapsed() > NO_MEMORY_DEADLINE => {
                    return Err(End::Lost(format!("no memory for page {}", unit.page)));
                }
                Answer::Later | Answer::NoMemory => i += 1,
                Answer::End(end) => return Err(end),
            }
        }
        Ok(())
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self) -> Option<End> {
        let session = self.session;
        if self.parked.is_empty() {
            let unhandled = &mut self.unhandled;
            // An error counts as something: the next turn meets and reports it.
            let ready = self.spin.wait(|| match session.read() {
                Ok(0) => false,
                Ok(count) => {
                    *unhandled = count;
                    true
                }
                Err(_) => true,
            });
            if ready {
                return None;
            }
        }
        let timeout = (!self.parked.is_empty()).then(|| {
            let pause = self.pause;
            self.pause = (pause * 2).min(MAX_PARK_PAUSE);
            TimeSpec::from(pause)
        });
        let mut fds = [
            PollFd::new(session.uffd.as_fd(), PollFlags::POLLIN),
            PollFd::new(session.peer.as_fd(), session.peer_end),
            PollFd::new(session.stop.as_fd(), PollFlags::POLLIN),
        ];
        match ppoll(&mut fds, timeout, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Some(End::Lost(format!("poll: {errno}"))),
        }
        let any = |i: usize| fds[i].any().unwrap_or(true);
        if any(2) {
            return Some(End::Stopped);
        }
        if any(1) {
            return Some(End::Gone);
        }
        let odd = PollFlags::POLLERR | PollFlags::POLLNVAL;
        if fds[0].revents().is_none_or(|events| events.intersects(odd)) {
            return Some(End::Lost("the userfaultfd became unusable".into()));
        }
        None
    }
}
