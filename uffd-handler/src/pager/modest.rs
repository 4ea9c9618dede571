//! A thread whose work can wait: others that wake up run at once.
//!
//! A nice value alone does not do that. The kernel's EEVDF scheduler lets a running thread finish its
//! slice (about 3 ms) before one that wakes up, whatever their nice values; so the slice is made short,
//! too. `SCHED_IDLE` would do it as well, but a thread that holds the lock on a VM's memory must not
//! starve.

use crate::sched;

/// Nice value of such a thread.
const NICE: i32 = 5;
/// Its slice, in nanoseconds: the least the kernel takes (Linux 6.12 and later; older ones ignore it).
const SLICE_NANOS: u64 = 100_000;

/// Makes the calling thread one. Where that is not allowed it is only less polite.
pub(super) fn become_modest() {
    sched::set(0, NICE, SLICE_NANOS, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_it() {
        let nice = std::thread::spawn(|| {
            become_modest();
            // SAFETY: integers only; of the calling thread.
            unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
        });
        assert_eq!(nice.join().unwrap(), NICE);
    }
}
