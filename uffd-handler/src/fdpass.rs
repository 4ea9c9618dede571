//! Messages with file descriptors over unix sockets, for the VMM's handshake and for the control
//! channel between the service and its page server.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Most descriptors one message may carry: the kernel's own limit (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// One received message.
#[derive(Debug)]
pub struct Received {
    /// Bytes written into the buffer; 0 is the end of the connection.
    pub len: usize,
    /// The descriptors that came along, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// Whether the kernel dropped bytes or descriptors that did not fit.
    pub truncated: bool,
}

/// Sends one message without waiting for room; `EAGAIN` when the peer does not read.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)
}

/// Receives one message without waiting; `EAGAIN` when there is none.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Received, Errno> {
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    if let Ok(control_messages) = message.cmsgs() {
        for control_message in control_messages {
            if let ControlMessageOwned::ScmRights(raw) = control_message {
                // SAFETY: the kernel has just installed these for us, and nobody else knows them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
    }
    let truncated = message.flags.intersects(MsgFlags::MSG_CTRUNC | MsgFlags::MSG_TRUNC);
    Ok(Received { len: message.bytes, fds, truncated })
}

/// Waits until the descriptor has one of the events; false when the deadline passes first.
pub fn wait_for(fd: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> Result<bool, Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(fd, events)], poll_timeout(left)) {
            Ok(0) | Err(Errno::EINTR) if Instant::now() < deadline => {}
            Ok(0) | Err(Errno::EINTR) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno),
        }
    }
}

/// A poll timeout that never ends before the given time: rounded up to milliseconds.
pub fn poll_timeout(left: Duration) -> PollTimeout {
    let millis = left.as_micros().div_ceil(1000).min(i32::MAX as u128);
    PollTimeout::try_from(millis as i32).unwrap_or(PollTimeout::MAX)
}
