//! A QEMU that was started ahead: loaded and linked, which is half of its way to life, it waits
//! before its `main` to be told what to be.
//!
//! With `RETHAW_SHIM_WAIT` set to the number of a sequential-packet socket, one message is expected
//! on it, with descriptors:
//!
//! ```text
//! u32 arguments, u32 variables, one i32 per descriptor: the number it is to have, -1 for a network
//! namespace to enter; then strings, each ended by a zero byte: the working directory, the
//! arguments (the program's name first), the environment
//! ```
//!
//! Numbers are in the machine's byte order. The end of the connection ends the process.

use std::ffi::{c_char, c_int, c_void};
use std::mem::{size_of, transmute, zeroed};
use std::sync::OnceLock;

use crate::report::{die, errno};
use crate::{shown, variable};

type Main = unsafe extern "C" fn(c_int, *mut *mut c_char, *mut *mut c_char) -> c_int;
type Hook = Option<unsafe extern "C" fn()>;
type Start =
    unsafe extern "C" fn(Main, c_int, *mut *mut c_char, Hook, Hook, Hook, *mut c_void) -> c_int;

/// Longest message.
const ROOM: usize = 128 << 10;
/// Most descriptors in it.
const MAX_FDS: usize = 16;
/// Where descriptors wait while those they are to replace are still needed.
const ASIDE: c_int = 100;

static MAIN: OnceLock<Main> = OnceLock::new();

unsafe extern "C" {
    static mut environ: *mut *mut c_char;
}

/// Stands in for the C library's function that calls `main`.
///
/// # Safety
/// As the C library's: called once, by the program's first instructions.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __libc_start_main(
    main: Main,
    argc: c_int,
    argv: *mut *mut c_char,
    init: Hook,
    fini: Hook,
    rtld_fini: Hook,
    stack_end: *mut c_void,
) -> c_int {
    // Programs linked before glibc 2.34 bring functions of their own for it to call.
    let version = if init.is_some() { c"GLIBC_2.2.5" } else { c"GLIBC_2.34" };
    // SAFETY: constant strings; the function found is the one this stands in for.
    let next = unsafe {
        let name = c"__libc_start_main".as_ptr();
        libc::dlvsym(libc::RTLD_NEXT, name, version.as_ptr())
    };
    if next.is_null() {
        die("this C library has no __libc_start_main to go on with", 0);
    }
    let main = match MAIN.set(main) {
        Ok(()) if variable(c"RETHAW_SHIM_WAIT").is_some() => main_when_told,
        _ => main,
    };
    // SAFETY: see above; all arguments are passed on, `main` has the same type.
    unsafe {
        let next: Start = transmute(next);
        next(main, argc, argv, init, fini, rtld_fini, stack_end)
    }
}

unsafe extern "C" fn main_when_told(_: c_int, _: *mut *mut c_char, _: *mut *mut c_char) -> c_int {
    let number = variable(c"RETHAW_SHIM_WAIT").and_then(|text| text.to_str().ok()?.parse().ok());
    let Some(socket) = number else { die("RETHAW_SHIM_WAIT is no descriptor's number", 0) };
    // As long as the process: it is the arguments and the environment.
    let buffer: &'static mut [u8] = Vec::leak(vec![0; ROOM]);
    let (len, fds) = receive(socket, buffer);
    let Some(told) = Told::parse(&mut buffer[..len], fds.len()) else {
        die("what to be is told wrongly", 0)
    };
    take_places(socket, &fds, &told.places);
    shown::show(told.shown.0, told.shown.1);
    // SAFETY: a string that ends with a zero byte.
    if unsafe { libc::chdir(told.directory) } != 0 {
        die("entering the working directory", errno());
    }
    let (argc, argv) = (told.arguments.len() as c_int, null_ended(told.arguments));
    let env = null_ended(told.environment);
    let Some(main) = MAIN.get() else { die("no main to go on with", 0) };
    // SAFETY: no other thread runs yet; both arrays end with a null pointer and stay for ever.
    unsafe {
        environ = env;
        main(argc, argv, env)
    }
}

struct Told {
    places: Vec<c_int>,
    directory: *mut c_char,
    arguments: Vec<*mut c_char>,
    environment: Vec<*mut c_char>,
    /// First byte of the arguments, and the one behind them.
    shown: (*mut c_char, *mut c_char),
}

impl Told {
    fn parse(message: &'static mut [u8], fds: usize) -> Option<Self> {
        let word = |at: usize| {
            let bytes = message.get(at * 4..at * 4 + 4)?;
            Some(i32::from_ne_bytes(bytes.try_into().ok()?))
        };
        let arguments = usize::try_from(word(0)?).ok().filter(|count| *count > 0)?;
        let variables = usize::try_from(word(1)?).ok()?;
        let places = (0..fds).map(|fd| word(2 + fd)).collect::<Option<Vec<_>>>()?;
        let text = message.get_mut(8 + fds * 4..)?;
        if text.last() != Some(&0) {
            return None;
        }
        let mut strings = text.split_mut(|byte| *byte == 0);
        let mut next = || strings.next().map(|s| s.as_mut_ptr().cast::<c_char>());
        let directory = next()?;
        let arguments = (0..arguments).map(|_| next()).collect::<Option<Vec<_>>>()?;
        let environment = (0..variables).map(|_| next()).collect::<Option<Vec<_>>>()?;
        // What `split` finds behind the last zero byte.
        let end = next()?;
        let shown = (arguments[0], environment.first().copied().unwrap_or(end));
        strings.next().is_none().then_some(())?;
        Some(Self { places, directory, arguments, environment, shown })
    }
}

fn null_ended(mut pointers: Vec<*mut c_char>) -> *mut *mut c_char {
    pointers.push(std::ptr::null_mut());
    pointers.leak().as_mut_ptr()
}

/// Waits for the message.
fn receive(socket: c_int, buffer: &mut [u8]) -> (usize, Vec<c_int>) {
    let mut io = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = [0_u64; 2 + MAX_FDS / 2];
    // SAFETY: all zeros are a valid message; its pointers stay valid to the end of the block, and
    // the control buffer is aligned.
    unsafe {
        let mut header: libc::msghdr = zeroed();
        header.msg_iov = &raw mut io;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control) as _;
        let len = loop {
            let len = libc::recvmsg(socket, &raw mut header, libc::MSG_CMSG_CLOEXEC);
            if len >= 0 || errno() != libc::EINTR {
                break len;
            }
        };
        match len {
            // Nobody needs it any more.
            0 => libc::_exit(0),
            ..0 => die("receiving what to be", errno()),
            _ => {}
        }
        if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            die("what to be is too long", 0);
        }
        let mut fds = Vec::new();
        let rights = libc::CMSG_FIRSTHDR(&raw const header);
        if !rights.is_null() && (*rights).cmsg_type == libc::SCM_RIGHTS {
            let bytes = (*rights).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
            let data = libc::CMSG_DATA(rights).cast::<c_int>();
            fds.extend((0..bytes / size_of::<c_int>()).map(|i| data.add(i).read_unaligned()));
        }
        (len as usize, fds)
    }
}

/// Gives the descriptors their numbers, and enters the network namespace that is among them.
fn take_places(socket: c_int, fds: &[c_int], places: &[c_int]) {
    // SAFETY: integers only; whoever sent the descriptors has left them to this process, in which
    // nothing else runs yet.
    unsafe {
        let aside = |fd: c_int| {
            let moved = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, ASIDE);
            if moved < 0 {
                die("moving a descriptor", errno());
            }
            libc::close(fd);
            moved
        };
        let fds: Vec<c_int> = fds.iter().map(|fd| aside(*fd)).collect();
        libc::close(socket);
        for (fd, place) in fds.iter().zip(places) {
            let done = match *place {
                -1 => libc::setns(*fd, libc::CLONE_NEWNET),
                place => libc::dup2(*fd, place),
            };
            if done < 0 {
                die("taking over a descriptor or a network namespace", errno());
            }
            libc::close(*fd);
        }
    }
}
