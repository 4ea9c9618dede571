//! Scheduling of VMM processes.
//!
//! A refill must not cost a claim anything. A nice value is not enough for that: the kernel's EEVDF
//! scheduler lets a running thread finish its slice (up to 3 ms) whatever its nice value, at every
//! wake-up of a claim. A `SCHED_IDLE` thread is preempted at once.
#![allow(unsafe_code)]

use std::convert::Infallible;
use std::time::Duration;

use rustix::process::{Pid, setpriority_process};

use crate::vmm::Priority;

/// Sets the scheduling of every thread of `pid`. Threads it starts later inherit it.
pub fn set(pid: i32, priority: Priority) {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return };
    // A thread that ended meanwhile needs no priority, and without the right to raise one the VM
    // runs on slowly, which is better than not at all: failures are ignored.
    for task in tasks.flatten() {
        let tid = task.file_name().to_str().and_then(|t| t.parse().ok()).and_then(Pid::from_raw);
        let Some(tid) = tid else { continue };
        match priority {
            Priority::Background => set_policy(tid, libc::SCHED_IDLE),
            Priority::Normal => {
                set_policy(tid, libc::SCHED_OTHER);
                // "Normal" is as the service itself.
                let own = rustix::process::getpriority_process(None).unwrap_or(0);
                let _ = setpriority_process(Some(tid), own);
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
