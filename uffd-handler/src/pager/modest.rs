//! A thread whose work can wait: others that wake up run at once.
//!
//! A nice value alone does not do that. The kernel's EEVDF scheduler lets a running thread finish its
//! slice (about 3 ms) before one that wakes up, whatever their nice values; so the slice is made short,
//! too. `SCHED_IDLE` would do it as well, but a thread that holds the lock on a VM's memory must not
//! starve.

/// Nice value of such a thread.
const NICE: i32 = 5;
/// Its slice, in nanoseconds: the least the kernel takes (Linux 6.12 and later; older ones ignore it).
const SLICE_NANOS: u64 = 100_000;

/// The kernel's `struct sched_attr` (sched_setattr(2)), first version.
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Makes the calling thread one. Where that is not allowed it is only less polite.
pub(super) fn become_modest() {
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        nice: NICE,
        priority: 0,
        runtime: SLICE_NANOS,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the call reads one struct of the size that it names, and changes this thread only.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
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
