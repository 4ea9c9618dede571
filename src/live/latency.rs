//! Latencies of the interval under way, kept whole so that its percentiles are exact.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use utoipa::ToSchema;

/// Most values kept of one series and interval. Beyond it they are a fair sample.
const KEPT: usize = 4096;

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Series {
    /// Claims answered with a parked VM.
    Warm,
    /// Claims that found the pool empty and waited for a restore.
    Cold,
    /// Restores, up to the proven identity; in the background or while somebody waits.
    Restore,
}

static SAMPLES: Mutex<[Samples; 3]> = Mutex::new([const { Samples::new() }; 3]);

/// Something took so long.
pub fn took(series: Series, duration: Duration) {
    let ms = duration.as_secs_f64() * 1e3;
    SAMPLES.lock().unwrap_or_else(PoisonError::into_inner)[series as usize].add(ms);
}

/// What one interval came to, of one series.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
#[schema(as = LatencySummary)]
pub struct Summary {
    /// How many.
    pub count: u64,
    /// The median; absent when there was none.
    pub p50_ms: Option<f64>,
    /// 99 of 100 were as fast or faster.
    pub p99_ms: Option<f64>,
}

/// Ends the interval: its summaries in the order of [`Series`]; the next one is empty.
pub fn end_interval() -> [Summary; 3] {
    let mut samples = SAMPLES.lock().unwrap_or_else(PoisonError::into_inner);
    let ended = std::mem::replace(&mut *samples, [const { Samples::new() }; 3]);
    drop(samples);
    ended.map(Samples::summary)
}

#[derive(Debug)]
struct Samples {
    values: Vec<f64>,
    seen: u64,
}

impl Samples {
    const fn new() -> Self {
        Self { values: Vec::new(), seen: 0 }
    }

    fn add(&mut self, ms: f64) {
        self.seen += 1;
        if self.values.len() < KEPT {
            self.values.push(ms);
            return;
        }
        // Reservoir sampling: every value has the same chance to be among those kept.
        let at = rand::random_range(0..self.seen);
        if let Some(kept) = usize::try_from(at).ok().and_then(|at| self.values.get_mut(at)) {
            *kept = ms;
        }
    }

    fn summary(mut self) -> Summary {
        self.values.sort_by(f64::total_cmp);
        let rank = |part: f64| {
            let rank = (part * self.values.len() as f64).ceil() as usize;
            self.values.get(rank.saturating_sub(1)).map(|ms| (ms * 1e3).round() / 1e3)
        };
        Summary { count: self.seen, p50_ms: rank(0.5), p99_ms: rank(0.99) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: impl IntoIterator<Item = f64>) -> Summary {
        let mut samples = Samples::new();
        values.into_iter().for_each(|ms| samples.add(ms));
        samples.summary()
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        assert_eq!(of([]), Summary { count: 0, p50_ms: None, p99_ms: None });
        assert_eq!(of([3.0]), Summary { count: 1, p50_ms: Some(3.0), p99_ms: Some(3.0) });
        let hundred = of((1..=100).rev().map(f64::from));
        assert_eq!(hundred, Summary { count: 100, p50_ms: Some(50.0), p99_ms: Some(99.0) });
    }

    #[test]
    fn a_flood_stays_bounded_and_fair() {
        let mut samples = Samples::new();
        (0..10 * KEPT).for_each(|n| samples.add(n as f64));
        assert_eq!(samples.values.len(), KEPT);
        let summary = samples.summary();
        assert_eq!(summary.count, 10 * KEPT as u64);
        let median = summary.p50_ms.unwrap() / (10.0 * KEPT as f64);
        assert!((0.45..0.55).contains(&median), "{median}");
    }
}
