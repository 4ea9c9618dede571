//! Weight and slice of a thread under the kernel's ordinary scheduler, and ways past that one.

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
    let policy = libc::SCHED_OTHER as u32;
    let attr = SchedAttr { policy, flags, nice: nice.clamp(-20, 19), runtime: slice_nanos, ..NONE };
    call(tid, &attr);
}

/// Has a thread go before all that are scheduled as usual, and before those of a lower `priority`
/// (from 1 on); false where that is not allowed, or the thread has ended.
pub fn set_real_time(tid: i32, priority: u32, flags: u64) -> bool {
    call(tid, &SchedAttr { policy: libc::SCHED_RR as u32, flags, priority, ..NONE })
}

const NONE: SchedAttr = SchedAttr {
    size: size_of::<SchedAttr>() as u32,
    policy: 0,
    flags: 0,
    nice: 0,
    priority: 0,
    runtime: 0,
    deadline: 0,
    period: 0,
};

fn call(tid: i32, attr: &SchedAttr) -> bool {
    // SAFETY: the call reads one struct of the size that it names, and changes no memory.
    unsafe { libc::syscall(libc::SYS_sched_setattr, tid, std::ptr::from_ref(attr), 0) == 0 }
}
