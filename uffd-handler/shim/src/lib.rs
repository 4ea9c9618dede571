//! Preload shim that hands QEMU's guest RAM to a page server, the way Firecracker does it itself.
//!
//! Preloaded into QEMU with `RETHAW_UFFD_SIZE` (bytes of guest RAM) and `RETHAW_UFFD_SOCKET` set,
//! it waits for QEMU to map a memory backend of that size, shared and backed by a descriptor
//! (`memory-backend-memfd` or `memory-backend-file` with `share=on`). It registers the mapping with
//! a new userfaultfd and sends both over the socket. The backend has to be empty: a page that is
//! there already is never asked for.
//!
//! QEMU must not run with memory that nobody serves, so every failure ends the process with a
//! message. Without the variables the shim does nothing.
//!
//! With `RETHAW_SHIM_WAIT` it waits before `main` for its arguments and its environment, see
//! [`blank`].

#![warn(missing_docs)]

mod blank;
mod handover;
mod report;
mod shown;

use std::ffi::{CStr, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

/// Set once guest RAM was handed over.
static DONE: AtomicBool = AtomicBool::new(false);

/// Stands in for the C library's `mmap64`.
///
/// # Safety
/// As `mmap(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // The system call itself: looking up the C library's function could allocate, and map, here.
    // SAFETY: the caller's arguments, passed on as they are.
    let mapped = unsafe {
        libc::syscall(libc::SYS_mmap, address, len, protection, flags, fd, offset) as *mut c_void
    };
    let may_be_ram = fd >= 0 && flags & libc::MAP_SHARED != 0 && mapped != libc::MAP_FAILED;
    if may_be_ram && wanted_size() == Some(len) {
        if DONE.swap(true, Ordering::AcqRel) {
            // Through a second mapping, pages that nobody has served yet would read as zeros.
            report::die("guest RAM is mapped twice", 0);
        }
        handover::hand_over(mapped, len, socket_path());
    }
    mapped
}

/// Stands in for the C library's `mmap`, which is the same on 64-bit machines.
///
/// # Safety
/// As `mmap(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: the same contract.
    unsafe { mmap64(address, len, protection, flags, fd, offset) }
}

/// A variable of the environment, without allocating.
fn variable(name: &CStr) -> Option<&'static CStr> {
    // SAFETY: QEMU does not change its environment; the result points into it.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    // SAFETY: a string of the environment ends with a zero byte and stays where it is.
    (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) })
}

fn wanted_size() -> Option<usize> {
    let text = variable(c"RETHAW_UFFD_SIZE")?;
    match text.to_str().ok().and_then(|text| text.parse::<usize>().ok()) {
        Some(size) if size > 0 && size % 4096 == 0 => Some(size),
        _ => report::die("RETHAW_UFFD_SIZE is not a number of bytes in whole pages", 0),
    }
}

fn socket_path() -> &'static CStr {
    variable(c"RETHAW_UFFD_SOCKET")
        .unwrap_or_else(|| report::die("RETHAW_UFFD_SOCKET is not set", 0))
}
