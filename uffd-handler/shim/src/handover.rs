//! Registers guest RAM with a userfaultfd and sends both to the page server.

use std::ffi::{CStr, c_int, c_void};
use std::fmt::Write;
use std::mem::{size_of, zeroed};

use crate::report::{Text, die, errno};

const API: u64 = 0xAA;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const REGISTER_MODE_MISSING: u64 = 1;
/// `_IO(0xAA, 0x00)`, on /dev/userfaultfd.
const IOC_NEW: u64 = 0xAA00;
/// `_IOWR(0xAA, 0x3f, 24 bytes)`.
const UFFDIO_API: u64 = 0xc018_aa3f;
/// `_IOWR(0xAA, 0x00, 32 bytes)`.
const UFFDIO_REGISTER: u64 = 0xc020_aa00;

#[repr(C)]
struct ApiRequest {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RegisterRequest {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// Hands the mapping over. Userfaultfd and socket stay open for the life of the process: their
/// end is how the page server learns of QEMU's.
pub(crate) fn hand_over(start: *mut c_void, len: usize, socket: &CStr) {
    let uffd = open_userfaultfd();
    // Ranges that QEMU gives back (a balloon does) have to read as zeros afterwards.
    let mut api =
        ApiRequest { api: API, features: FEATURE_MISSING_SHMEM | FEATURE_EVENT_REMOVE, ioctls: 0 };
    // SAFETY: the structure is the one this call takes.
    if unsafe { libc::ioctl(uffd, UFFDIO_API as _, &raw mut api) } != 0 {
        die("this kernel's userfaultfd has no shared memory or no remove events", errno());
    }
    let mut register = RegisterRequest {
        start: start as u64,
        len: len as u64,
        mode: REGISTER_MODE_MISSING,
        ioctls: 0,
    };
    // SAFETY: as above; the range is a mapping that was just made.
    if unsafe { libc::ioctl(uffd, UFFDIO_REGISTER as _, &raw mut register) } != 0 {
        die("registering guest RAM", errno());
    }
    let mut message = Text::new();
    let base = start as u64;
    if write!(
        message,
        "[{{\"base_host_virt_addr\":{base},\"size\":{len},\"offset\":0,\"page_size\":4096,\
         \"page_size_kib\":4096}}]"
    )
    .is_err()
    {
        die("handshake too long", 0);
    }
    send(connect(socket), message.bytes(), uffd);
}

/// Kernel faults have to be served too: devices read and write guest RAM by system calls.
fn open_userfaultfd() -> c_int {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: integers only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as c_int;
    if fd >= 0 {
        return fd;
    }
    let refused = errno();
    // Without the capability, access to the device is what permits it.
    // SAFETY: a constant path; the ioctl takes an integer.
    let fd = unsafe {
        let device = libc::open(c"/dev/userfaultfd".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if device < 0 {
            die("no userfaultfd: neither the system call nor /dev/userfaultfd", refused);
        }
        let fd = libc::ioctl(device, IOC_NEW as _, flags);
        libc::close(device);
        fd
    };
    if fd < 0 {
        die("no userfaultfd from /dev/userfaultfd", errno());
    }
    fd
}

fn connect(path: &CStr) -> c_int {
    // SAFETY: all zeros are a valid address.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.to_bytes();
    if bytes.len() >= address.sun_path.len() {
        die("RETHAW_UFFD_SOCKET is too long for a socket", 0);
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: integers, then an address of the size given.
    unsafe {
        let socket = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        let size = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        if socket < 0 || libc::connect(socket, (&raw const address).cast(), size) != 0 {
            die("connecting to RETHAW_UFFD_SOCKET", errno());
        }
        socket
    }
}

fn send(socket: c_int, message: &[u8], fd: c_int) {
    let mut io = libc::iovec { iov_base: message.as_ptr() as *mut c_void, iov_len: message.len() };
    let mut control = [0_u64; 4];
    // SAFETY: all zeros are a valid message; its pointers stay valid to the end of the block, and
    // the control buffer is aligned and larger than the space of one descriptor.
    unsafe {
        let mut header: libc::msghdr = zeroed();
        header.msg_iov = &raw mut io;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(size_of::<c_int>() as u32) as _;
        let rights = libc::CMSG_FIRSTHDR(&raw const header);
        (*rights).cmsg_level = libc::SOL_SOCKET;
        (*rights).cmsg_type = libc::SCM_RIGHTS;
        (*rights).cmsg_len = libc::CMSG_LEN(size_of::<c_int>() as u32) as _;
        libc::CMSG_DATA(rights).cast::<c_int>().write_unaligned(fd);
        let sent = libc::sendmsg(socket, &raw const header, libc::MSG_NOSIGNAL);
        if sent != message.len() as isize {
            die("sending the handshake", errno());
        }
    }
}
