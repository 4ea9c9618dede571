//! Scheduling of the service and of VMM processes.
//!
//! A refill must not cost a claim anything. A nice value is not enough for that: the kernel's EEVDF
//! scheduler lets a running thread finish its slice (up to 3 ms) whatever its nice value, at every
//! wake-up of a claim. A `SCHED_IDLE` thread is preempted at once; and one that asks for slices shorter
//! than the usual preempts those that do not.
//!
//! Neither helps a thread that has had more than its share, however short: since Linux 6.6 it owes that
//! when it wakes up, and waits for up to a tick behind idle ones. So those on the path of a claim are
//! real-time threads where that is allowed: the service's that answer requests, and a VM's while it is
//! handed over. No user's code runs in a VM by then, and it is a matter of milliseconds.
#![allow(unsafe_code)]

use std::convert::Infallible;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::{Pid, setpriority_process};
use uffd_handler::sched;

use crate::vmm::Priority;

/// How much more the service's threads count than a VM's (in nice values), and a dying VM's less.
const PREFERRED: i32 = -10;
const DYING: i32 = 10;
/// The slice of the service's threads: shorter than usual, and long enough that they are not preempted
/// in the middle of a request themselves. (Linux 6.12 and later; older ones ignore slices.)
const SLICE_NANOS: u64 = 1_000_000;
/// The slice of a process nobody waits for: the least the kernel takes.
const DYING_SLICE_NANOS: u64 = 100_000;
/// Real-time priorities: the service goes before what it hands over.
const SERVICE: u32 = 2;
const HAND_OVER: u32 = 1;

static REAL_TIME: AtomicBool = AtomicBool::new(true);

/// From now on no thread is made a real-time one.
pub fn forbid_real_time() {
    REAL_TIME.store(false, Ordering::Relaxed);
}

/// The nice value the service was started with: what is normal for a VM. To be asked first by a
/// thread that still has it.
pub fn own_nice() -> i32 {
    static OWN: OnceLock<i32> = OnceLock::new();
    *OWN.get_or_init(|| rustix::process::getpriority_process(None).unwrap_or(0))
}

/// Has the calling thread, one of the service's, go before VMs. Processes that it starts are ordinary.
/// Without the right to it, claims are slower on a busy host.
pub fn prefer_this_thread() {
    sched::set(0, own_nice() + PREFERRED, SLICE_NANOS, sched::RESET_ON_FORK);
}

/// Has the calling thread, one that answers requests, go before everything else. It must never compute
/// for long.
pub fn hurry_this_thread() {
    if !(REAL_TIME.load(Ordering::Relaxed)
        && sched::set_real_time(0, SERVICE, sched::RESET_ON_FORK))
    {
        prefer_this_thread();
    }
}

/// Whether threads of this process can be real-time ones.
pub fn real_time_is_allowed() -> bool {
    // On a thread of its own, which ends with what it was given.
    let attempt = || sched::set_real_time(0, HAND_OVER, sched::RESET_ON_FORK);
    std::thread::spawn(attempt).join().unwrap_or(false)
}

/// Has a VMM that is about to be killed give its memory back when nobody else wants the CPU: that
/// takes milliseconds, and nobody waits for it.
pub fn dying(pid: i32) {
    for tid in threads(pid) {
        sched::set(tid.as_raw_nonzero().get(), own_nice() + DYING, DYING_SLICE_NANOS, 0);
    }
}

fn threads(pid: i32) -> impl Iterator<Item = Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|task| task.file_name().to_str()?.parse().ok().and_then(Pid::from_raw))
}

/// Sets the scheduling of every thread of `pid`. Threads it starts later inherit it.
pub fn set(pid: i32, priority: Priority) {
    // A thread that ended meanwhile needs no priority, and without the right to raise one the VM
    // runs on slowly, which is better than not at all: failures are ignored.
    for tid in threads(pid) {
        match priority {
            Priority::Background => set_policy(tid, libc::SCHED_IDLE),
            Priority::HandOver
                if REAL_TIME.load(Ordering::Relaxed)
                    && sched::set_real_time(tid.as_raw_nonzero().get(), HAND_OVER, 0) => {}
            Priority::HandOver | Priority::Normal => {
                set_policy(tid, libc::SCHED_OTHER);
                let _ = setpriority_process(Some(tid), own_nice());
            }
        }
    }
}

/// A step in the background that takes longer than this is being starved.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Goes on at normal priority with a process that is being starved: a host that is busy for good must
/// not run a start into its deadline. Runs beside the start, and never ends by itself.
pub async fn starved(pid: i32) -> Infallible {
    tokio::time::sleep(PATIENCE).await;
    set(pid, Priority::Normal);
    std::future::pending().await
}

fn set_policy(tid: Pid, policy: i32) {
    // SAFETY: all-zero is a valid `sched_param`; it is only read by the call.
    let param: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: `param` lives for the call, which changes nothing in this process's memory.
    let _ =
        unsafe { libc::sched_setscheduler(tid.as_raw_nonzero().get(), policy, &raw const param) };
}
