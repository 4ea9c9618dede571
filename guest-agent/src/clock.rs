//! The guest's clocks: the wall clock is set from the host's, the others are only read.

use crate::server::ApiError;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use std::io;
use std::time::Duration;

/// Nanoseconds that count as none on an emulated machine.
const CLOSE_NANOS: i64 = 1_000_000;
/// Attempts at what a busy host can spoil.
const TRIES: u32 = 10;

/// A point on the clock that nobody sets.
#[derive(Debug, Clone, Copy)]
pub struct Instant {
    nanos: i64,
}

/// Difference between the wall clock and what the host says it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offset {
    /// Guest minus host.
    pub nanos: i64,
}

fn read(clock: ClockId) -> io::Result<i64> {
    let now = clock_gettime(clock)?;
    Ok(now.tv_sec().saturating_mul(1_000_000_000).saturating_add(now.tv_nsec()))
}

impl Instant {
    /// Now.
    ///
    /// # Errors
    /// The clock cannot be read.
    pub fn now() -> io::Result<Self> {
        read(ClockId::CLOCK_MONOTONIC).map(|nanos| Self { nanos })
    }

    /// Microseconds since then.
    pub fn micros(self) -> u64 {
        let now = read(ClockId::CLOCK_MONOTONIC).unwrap_or(self.nanos);
        u64::try_from((now - self.nanos) / 1000).unwrap_or(0)
    }
}

/// Host time that was valid when a request arrived.
#[derive(Debug, Clone, Copy)]
pub struct HostTime {
    unix_nanos: i64,
    received: Instant,
}

impl HostTime {
    /// `unix_nanos` is what the host's clock said; `received` is when it was read here.
    ///
    /// # Errors
    /// 400 when the time is not after 2020: a clock that far off is a mistake.
    pub fn new(unix_nanos: u64, received: Instant) -> Result<Self, ApiError> {
        const YEAR_2020: i64 = 1_577_836_800_000_000_000;
        match i64::try_from(unix_nanos) {
            Ok(unix_nanos) if unix_nanos > YEAR_2020 => Ok(Self { unix_nanos, received }),
            _ => Err(ApiError::new(
                400,
                crate::wire::codes::INVALID_REQUEST,
                format!("wall_clock_unix_nanos {unix_nanos} is no time between 2020 and 2262"),
            )),
        }
    }

    /// What the host's clock says at `now`, as far as the guest can know.
    fn at(self, now: Instant) -> i64 {
        self.unix_nanos + (now.nanos - self.received.nanos)
    }

    /// How far off the wall clock is. Two clocks cannot be read at once, and a busy host may stop this
    /// machine between them: the closest of a few pairs counts.
    ///
    /// # Errors
    /// A clock cannot be read.
    pub fn offset(self) -> io::Result<Offset> {
        let mut best = (i64::MAX, 0);
        for _ in 0..TRIES {
            let before = Instant::now()?;
            let guest = read(ClockId::CLOCK_REALTIME)?;
            let width = Instant::now()?.nanos - before.nanos;
            best = best.min((width, guest - self.at(before)));
            if width <= CLOSE_NANOS {
                break;
            }
        }
        Ok(Offset { nanos: best.1 })
    }

    /// Sets the wall clock; again, when this machine was stopped between asking for the time and
    /// setting it. How far off it is then.
    ///
    /// # Errors
    /// Not permitted.
    pub fn set(self) -> io::Result<Offset> {
        let mut tries = TRIES;
        loop {
            let now = self.at(Instant::now()?);
            let time = TimeSpec::new(now.div_euclid(1_000_000_000), now.rem_euclid(1_000_000_000));
            clock_settime(ClockId::CLOCK_REALTIME, time)?;
            let offset = self.offset()?;
            tries -= 1;
            if tries == 0 || offset.nanos.abs() <= CLOSE_NANOS {
                return Ok(offset);
            }
        }
    }
}

/// Time since boot.
pub fn uptime() -> Duration {
    let nanos = read(ClockId::CLOCK_BOOTTIME).unwrap_or(0);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(0))
}

impl From<io::Error> for ApiError {
    fn from(error: io::Error) -> Self {
        Self::internal(error.to_string())
    }
}
