//! Weight and slice of a thread under the kernel's ordinary scheduler.

/// `SCHED_FLAG_RESET_ON_FORK`: what the thread starts is ordinary again.
pub const RESET_ON_FORK: u64 = 1;

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

/// Sets a thread's nice value and slice; 0 is the calling thread. Linux before 6.12 ignores the slice.
/// Where it is not allowed, or the thread has ended, nothing changes: it is never more than a wish.
pub fn set(tid: i32, nice: i32, slice_nanos: u64, flags: u64) {
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags,
        nice: nice.clamp(-20, 19),
        priority: 0,
        runtime: slice_nanos,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the call reads one struct of the size that it names, and changes no memory.
    unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const attr, 0) };
}
