//! How a child ended, from its pidfd.

use super::signal;
use std::os::fd::{AsRawFd, OwnedFd};

/// Exit code as a shell would show it, and the signal's name when one ended it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// 0 to 255, or 128 plus the signal.
    pub code: i32,
    /// Name of the signal.
    pub signal: Option<String>,
}

/// Takes a child's remains; `None` while it runs, when `flags` has WNOHANG.
pub fn wait(pidfd: &OwnedFd, flags: i32) -> Option<Ended> {
    // SAFETY: an all-zero siginfo_t is valid, and waitid writes nothing else.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: `info` is writable; the descriptor is a pidfd of a child of this process.
        let result = unsafe {
            let id = pidfd.as_raw_fd() as libc::id_t;
            libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED | flags)
        };
        if result == 0 {
            break;
        }
        if std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            // ECHILD: somebody else took it. It is over, and how is not known.
            return Some(Ended { code: -1, signal: None });
        }
    }
    // SAFETY: waitid filled in the fields of a SIGCHLD, or left the pid zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return None;
    }
    if info.si_code == libc::CLD_EXITED {
        return Some(Ended { code: status, signal: None });
    }
    Some(Ended { code: 128 + status, signal: Some(signal::name(status)) })
}
