//! Pseudo-terminals.

use crate::wire::PtySize;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Opens a terminal of this size: the agent's end (not blocking) and the program's.
///
/// # Errors
/// There is no devpts, or no terminal left.
pub fn open(size: PtySize) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK;
    let master: OwnedFd =
        OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/ptmx")?.into();
    let unlock: libc::c_int = 0;
    // SAFETY: the request reads one int.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the request takes open flags and returns a new descriptor.
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    if slave < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    resize(&master, size)?;
    Ok((master, slave))
}

/// Gives the terminal a new size.
///
/// # Errors
/// It is gone.
pub fn resize(master: &impl AsRawFd, size: PtySize) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request reads one winsize.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
