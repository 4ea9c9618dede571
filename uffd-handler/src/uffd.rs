//! Thin ioctl layer over a userfaultfd.
//!
//! The `userfaultfd` crate is used wherever it tells the whole truth (create, register, wake,
//! unregister). Copying, zeroing and reading messages are done here, because a page server must
//! tell apart outcomes the crate merges: how much of a batch went in before it stopped, and
//! whether it stopped for a page that is there already, for a mapping that is changing, for a VM
//! that is gone or for a source that cannot be read.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use userfaultfd::Uffd;

/// Smallest page the server deals in, and the unit of all its bitmaps and page numbers.
pub const PAGE: u64 = 4096;
/// Huge page size that hugetlbfs-backed guests use.
pub const HUGE_PAGE: u64 = 2 << 20;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
const FAULT_FLAG_WRITE: u64 = 1;
const MODE_DONTWAKE: u64 = 1;
/// `UFFD_FEATURE_EVENT_REMOVE` as fdinfo shows it.
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;

/// The kernel's structures and calls.
#[allow(missing_docs, reason = "the macros of `nix` cannot carry documentation")]
mod raw {
    #[repr(C)]
    pub struct UffdioCopy {
        pub dst: u64,
        pub src: u64,
        pub len: u64,
        pub mode: u64,
        pub copy: i64,
    }

    #[repr(C)]
    pub struct UffdioZeropage {
        pub start: u64,
        pub len: u64,
        pub mode: u64,
        pub zeropage: i64,
    }

    nix::ioctl_readwrite!(copy, 0xAA, 0x03, UffdioCopy);
    nix::ioctl_readwrite!(zeropage, 0xAA, 0x04, UffdioZeropage);
}
use raw::{UffdioCopy, UffdioZeropage};

/// Why an install stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillStop {
    /// The page is there already.
    Exists,
    /// The VMM is changing its mappings; the same call works once it is done.
    Again,
    /// The VMM's address space is gone.
    VmGone,
    /// No registered mapping covers the range.
    NoMapping,
    /// The source address could not be read (a file that became shorter).
    BadSource,
    /// No memory, or the guest's memory file is full.
    NoMemory,
    /// Anything else: an errno that means a mistake on this side.
    Other(i32),
}

/// What one install call did. With `installed` short of the request and no `stop`, the rest has
/// to be tried again to learn why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Bytes now in place because of this call.
    pub installed: u64,
    /// Why nothing at all was installed.
    pub stop: Option<FillStop>,
}

impl Fill {
    fn from_ioctl(len: u64, outcome: Result<i32, Errno>, out_field: i64) -> Self {
        match outcome {
            Ok(_) => Self { installed: len, stop: None },
            // A part went in. The out field counts bytes then, and is a negated errno otherwise.
            Err(Errno::EAGAIN) if out_field > 0 => Self { installed: out_field as u64, stop: None },
            Err(errno) => Self { installed: 0, stop: Some(FillStop::from_errno(errno)) },
        }
    }
}

impl FillStop {
    fn from_errno(errno: Errno) -> Self {
        match errno {
            Errno::EEXIST => Self::Exists,
            Errno::EAGAIN => Self::Again,
            Errno::ESRCH => Self::VmGone,
            Errno::ENOENT => Self::NoMapping,
            Errno::EFAULT => Self::BadSource,
            Errno::ENOMEM | Errno::ENOSPC => Self::NoMemory,
            other => Self::Other(other as i32),
        }
    }
}

/// Room for one message as the kernel writes it (`struct uffd_msg`, 32 bytes). Atomic, because it
/// may lie in memory that another process reads once this one is dead.
#[repr(C)]
#[derive(Debug, Default)]
pub struct MessageSlot([AtomicU64; 4]);

/// A decoded message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A thread waits for the page at this address.
    Fault {
        /// Faulting address, not necessarily page aligned.
        address: u64,
        /// Whether it was a write.
        write: bool,
    },
    /// The VMM gave a range back; what is touched there later reads as zeros.
    Remove {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// An event no VMM asks for.
    Other(u8),
}

impl MessageSlot {
    /// Takes the message apart.
    pub fn decode(&self) -> Message {
        let word = |i: usize| self.0[i].load(Ordering::Relaxed);
        match word(0).to_le_bytes()[0] {
            EVENT_PAGEFAULT => {
                Message::Fault { address: word(2), write: word(1) & FAULT_FLAG_WRITE != 0 }
            }
            EVENT_REMOVE => Message::Remove { start: word(1), end: word(2) },
            other => Message::Other(other),
        }
    }
}

/// A userfaultfd of a VMM, as a page server uses it.
#[derive(Debug)]
pub struct PageFd(Uffd);

impl PageFd {
    /// Takes over a descriptor that [`is_userfaultfd`] accepted.
    pub fn new(fd: OwnedFd) -> Self {
        // SAFETY: the descriptor is owned and ownership moves into the `Uffd`.
        Self(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) })
    }

    /// Installs a copy of `len` bytes at `src` in the VM at `dst`; wakes waiters unless told not to.
    ///
    /// # Safety
    /// `src..src + len` must be mapped in this process for the whole call. (A page in it that the
    /// kernel cannot read is an outcome, not undefined behaviour.)
    pub unsafe fn copy(&self, dst: u64, src: *const u8, len: u64, wake: bool) -> Fill {
        let mode = if wake { 0 } else { MODE_DONTWAKE };
        let mut request = UffdioCopy { dst, src: src as u64, len, mode, copy: 0 };
        // SAFETY: the struct matches the kernel's; the caller vouches for `src`.
        let outcome = unsafe { raw::copy(self.0.as_raw_fd(), &raw mut request) };
        Fill::from_ioctl(len, outcome, request.copy)
    }

    /// Installs zeros without a source.
    pub fn zeropage(&self, start: u64, len: u64, wake: bool) -> Fill {
        let mode = if wake { 0 } else { MODE_DONTWAKE };
        let mut request = UffdioZeropage { start, len, mode, zeropage: 0 };
        // SAFETY: the struct matches the kernel's and holds no pointer into this process.
        let outcome = unsafe { raw::zeropage(self.0.as_raw_fd(), &raw mut request) };
        Fill::from_ioctl(len, outcome, request.zeropage)
    }

    /// Wakes every thread that waits in the range; each one faults again if its page is missing.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), userfaultfd::Error> {
        self.0.wake(start as *mut libc::c_void, len as usize)
    }

    /// Ends the tracking of a range: what is missing from here on is the kernel's business.
    pub fn unregister(&self, start: u64, len: u64) -> Result<(), userfaultfd::Error> {
        self.0.unregister(start as *mut libc::c_void, len as usize)
    }

    /// Reads as many messages as there are and fit. `Err(EAGAIN)` when there are none.
    pub fn read(&self, slots: &[MessageSlot]) -> Result<usize, Errno> {
        // SAFETY: slots have the kernel's layout and the length is the slice's; they are atomics
        // throughout, so they may be written behind a shared reference.
        let got = unsafe {
            let start = slots.as_ptr().cast_mut();
            libc::read(self.0.as_raw_fd(), start.cast(), size_of_val(slots))
        };
        Errno::result(got).map(|bytes| bytes as usize / size_of::<MessageSlot>())
    }

    /// Whether the VMM asked to report the ranges it gives back.
    pub fn reports_removes(&self) -> bool {
        fdinfo_features(self.as_fd()).is_none_or(|features| features & FEATURE_EVENT_REMOVE != 0)
    }
}

impl AsFd for PageFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// Whether the descriptor really is a userfaultfd, whatever its sender says.
pub fn is_userfaultfd(fd: BorrowedFd<'_>) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
}

/// Features that the owner enabled, from the `API:` line of fdinfo (`aa:<enabled>:<available>`).
fn fdinfo_features(fd: BorrowedFd<'_>) -> Option<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("API:"))?;
    u64::from_str_radix(line.trim().split(':').nth(1)?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_copies_are_not_errors() {
        let fill = Fill::from_ioctl(8192, Err(Errno::EAGAIN), 4096);
        assert_eq!(fill, Fill { installed: 4096, stop: None });
        let fill = Fill::from_ioctl(8192, Err(Errno::EAGAIN), -11);
        assert_eq!(fill, Fill { installed: 0, stop: Some(FillStop::Again) });
        // Kernels before 5.x leave the out field alone when the mapping changes.
        let fill = Fill::from_ioctl(8192, Err(Errno::EAGAIN), 0);
        assert_eq!(fill.stop, Some(FillStop::Again));
    }

    #[test]
    fn only_a_userfaultfd_is_one() {
        let file = tempfile::tempfile().unwrap();
        assert!(!is_userfaultfd(file.as_fd()));
        let uffd = userfaultfd::UffdBuilder::new().user_mode_only(true).non_blocking(true).create();
        let page_fd = PageFd(uffd.unwrap());
        assert!(is_userfaultfd(page_fd.as_fd()));
        assert!(!page_fd.reports_removes());
        assert_eq!(
            page_fd.read(&[MessageSlot::default(), MessageSlot::default()]),
            Err(Errno::EAGAIN)
        );
    }
}
