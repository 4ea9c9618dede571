//! What the page server counts, per VM and in sum.

use serde::{Deserialize, Serialize};

/// Buckets of the fault latency histogram: bucket `i` counts faults that took less than `2^i` µs
/// and at least half of that; the last one takes the rest.
pub const LATENCY_BUCKETS: usize = 24;

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident => $field:ident,)*) => {
        /// One counter.
        #[derive(Clone, Copy, Debug)]
        #[repr(usize)]
        pub enum Counter { $($(#[$doc])* $variant,)* }

        /// Number of counters.
        pub(crate) const COUNTERS: usize = [$(Counter::$variant),*].len();

        /// Counts of one VM, or of all of them together.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Stats {
            $($(#[$doc])* pub $field: u64,)*
            /// Faults by time from being read to being answered.
            pub latency_buckets: [u64; LATENCY_BUCKETS],
        }

        impl Stats {
            pub(crate) fn set(&mut self, counters: &[u64; COUNTERS]) {
                $(self.$field = counters[Counter::$variant as usize];)*
            }

            /// Adds another VM's counts.
            pub fn add(&mut self, other: &Stats) {
                $(self.$field += other.$field;)*
                for (mine, more) in self.latency_buckets.iter_mut().zip(&other.latency_buckets) {
                    *mine += more;
                }
            }
        }
    };
}

counters! {
    /// Demand faults answered with saved contents.
    FaultsData => faults_data,
    /// Demand faults answered with zeros.
    FaultsZero => faults_zero,
    /// Demand faults on pages that were there already by the time.
    FaultsPresent => faults_present,
    /// Demand faults on pages the VMM had given back, answered with zeros.
    FaultsRemoved => faults_removed,
    /// Times a fault had to wait because the VMM was changing its mappings or memory was short.
    FaultsParked => faults_parked,
    /// Demand faults that were writes.
    FaultsWrite => faults_write,
    /// Ranges the VMM gave back.
    Removes => removes,
    /// Bytes copied into the VM, on demand or ahead of it.
    BytesCopied => bytes_copied,
    /// Pages put in place ahead of demand, from the working set.
    Prefetched => prefetched,
    /// Pages put in place by graduation.
    Filled => filled,
    /// Of the pages put in place ahead of demand, those that are zeros.
    PrefetchedZero => prefetched_zero,
    /// Faults on pages of the working set: the replay came too late for them.
    WorkingSetLate => working_set_late,
    /// Faults on pages outside of the working set, when there is one.
    WorkingSetMiss => working_set_miss,
    /// Sum of the time faults took from being read to being answered, in nanoseconds.
    FaultNanos => fault_nanos,
    /// Times a page server took this VM over from another.
    Takeovers => takeovers,
    /// Reads of saved pages that failed and were tried again.
    SourceRetries => source_retries,
}

impl Stats {
    /// All demand faults.
    pub fn faults(&self) -> u64 {
        self.faults_data + self.faults_zero + self.faults_present + self.faults_removed
    }

    /// Part of the pages wanted that the working set brought before they were wanted.
    pub fn working_set_hit_ratio(&self) -> Option<f64> {
        let total = self.prefetched + self.working_set_late + self.working_set_miss;
        (self.prefetched > 0).then(|| self.prefetched as f64 / total as f64)
    }
}

/// The bucket of a duration.
pub(crate) fn latency_bucket(nanos: u64) -> usize {
    let micros = nanos / 1000;
    ((u64::BITS - micros.leading_zeros()) as usize).min(LATENCY_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_double() {
        assert_eq!(latency_bucket(0), 0);
        assert_eq!(latency_bucket(999), 0);
        assert_eq!(latency_bucket(1_000), 1);
        assert_eq!(latency_bucket(2_000), 2);
        assert_eq!(latency_bucket(3_999), 2);
        assert_eq!(latency_bucket(4_000), 3);
        assert_eq!(latency_bucket(u64::MAX), LATENCY_BUCKETS - 1);
    }
}
