//! Page faults of one interval, from the page server's running counts.

use std::time::Duration;

use serde::Serialize;
use uffd_handler::stats::Stats;
use utoipa::ToSchema;

/// The page server's work over one interval.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
#[schema(as = LiveFaults)]
pub struct Faults {
    /// Demand faults.
    pub per_second: f64,
    /// Bytes put into guests, on demand or ahead of it.
    pub copied_bytes_per_second: f64,
    /// 99 of 100 faults were answered within this time. The page server counts in powers of two,
    /// so this is an upper bound. Absent without a fault.
    pub p99_micros: Option<u64>,
}

/// What happened between two looks.
pub fn between(before: &Stats, now: &Stats, elapsed: Duration) -> Faults {
    let seconds = elapsed.as_secs_f64().max(1e-3);
    // A page server without memory of the one before starts at 0.
    let rate =
        |before: u64, now: u64| (now.saturating_sub(before) as f64 / seconds * 10.0).round() / 10.0;
    Faults {
        per_second: rate(before.faults(), now.faults()),
        copied_bytes_per_second: rate(before.bytes_copied, now.bytes_copied),
        p99_micros: p99(before, now),
    }
}

fn p99(before: &Stats, now: &Stats) -> Option<u64> {
    let pairs = before.latency_buckets.iter().zip(&now.latency_buckets);
    let counts: Vec<u64> = pairs.map(|(before, now)| now.saturating_sub(*before)).collect();
    let total: u64 = counts.iter().sum();
    let rank = total - total / 100;
    let mut seen = 0;
    let bucket = counts.iter().position(|count| {
        seen += count;
        seen >= rank && seen > 0
    });
    bucket.map(|i| 1 << i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences_over_time() {
        let mut before = Stats { faults_data: 100, bytes_copied: 1 << 20, ..Stats::default() };
        before.latency_buckets[3] = 100;
        let mut now = before.clone();
        now.faults_data += 300;
        now.faults_zero += 100;
        now.bytes_copied += 1 << 20;
        now.latency_buckets[5] += 397;
        now.latency_buckets[9] += 3;
        let faults = between(&before, &now, Duration::from_secs(2));
        assert_eq!(faults.per_second, 200.0);
        assert_eq!(faults.copied_bytes_per_second, f64::from(1 << 19));
        assert_eq!(faults.p99_micros, Some(1 << 5));
    }

    #[test]
    fn no_fault_has_no_latency() {
        let stats = Stats::default();
        assert_eq!(between(&stats, &stats, Duration::ZERO), Faults::default());
        let later = Stats { faults_data: 5, ..Stats::default() };
        assert_eq!(between(&later, &stats, Duration::from_secs(1)).per_second, 0.0);
    }
}
