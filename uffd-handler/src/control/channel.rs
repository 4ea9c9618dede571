//! One connection of the control channel.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, setsockopt, socket, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::fdpass;

/// Longest packet; the longest registration has about 30 KiB.
const MAX_PACKET: usize = 128 << 10;

/// Why a packet did not come or go.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The other end closed the connection or died.
    #[error("the other end of the control channel is gone")]
    Closed,
    /// Nothing came in time.
    #[error("no answer on the control channel in time")]
    TimedOut,
    /// The packet makes no sense.
    #[error("control packet refused: {0}")]
    Malformed(String),
    /// A system call failed.
    #[error("control channel: {call}: {errno}")]
    System {
        /// The call.
        call: &'static str,
        /// Its errno.
        errno: Errno,
    },
}

/// A connection that carries packets with descriptors.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Wraps a connected socket.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends one packet. Fails at once when the other end has stopped reading.
    pub fn send(
        &self,
        message: &impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes =
            serde_json::to_vec(message).map_err(|e| ChannelError::Malformed(e.to_string()))?;
        if bytes.len() > MAX_PACKET || fds.len() > fdpass::MAX_FDS {
            let what = format!("{} bytes and {} descriptors", bytes.len(), fds.len());
            return Err(ChannelError::Malformed(what));
        }
        match fdpass::send(self.as_fd(), &bytes, fds) {
            Ok(_) => Ok(()),
            Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => Err(ChannelError::Closed),
            Err(errno) => Err(ChannelError::System { call: "sendmsg", errno }),
        }
    }

    /// Takes one packet if there is one.
    pub fn try_receive<T: DeserializeOwned>(
        &self,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        let mut buffer = vec![0; MAX_PACKET];
        match fdpass::receive(self.as_fd(), &mut buffer) {
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(Errno::ECONNRESET) => Err(ChannelError::Closed),
            Err(errno) => Err(ChannelError::System { call: "recvmsg", errno }),
            Ok(received) if received.len == 0 => Err(ChannelError::Closed),
            Ok(received) if received.truncated => Err(ChannelError::Malformed("cut off".into())),
            Ok(received) => serde_json::from_slice(&buffer[..received.len])
                .map(|message| Some((message, received.fds)))
                .map_err(|error| ChannelError::Malformed(error.to_string())),
        }
    }

    /// Waits for one packet.
    pub fn receive<T: DeserializeOwned>(
        &self,
        deadline: Instant,
    ) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        loop {
            if let Some(packet) = self.try_receive()? {
                return Ok(packet);
            }
            let ready = fdpass::wait_for(self.as_fd(), PollFlags::POLLIN, deadline)
                .map_err(|errno| ChannelError::System { call: "poll", errno })?;
            if !ready {
                return Err(ChannelError::TimedOut);
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn new_socket() -> Result<OwnedFd, Errno> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
}

/// Connects to a page server; `Ok(None)` when none listens there.
pub fn connect(path: &Path) -> Result<Option<Channel>, ChannelError> {
    let system = |call| move |errno| ChannelError::System { call, errno };
    let fd = new_socket().map_err(system("socket"))?;
    let address = UnixAddr::new(path).map_err(system("socket path"))?;
    match nix::sys::socket::connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &address) {
        Ok(()) => Ok(Some(Channel::new(fd))),
        Err(Errno::ENOENT | Errno::ECONNREFUSED) => Ok(None),
        Err(errno) => Err(ChannelError::System { call: "connect", errno }),
    }
}

/// Listens on a path that nobody else serves; a left-over socket file is replaced. Only the owner
/// may connect.
pub fn listen(path: &Path) -> Result<OwnedFd, ChannelError> {
    let system = |call| move |errno| ChannelError::System { call, errno };
    let fd = new_socket().map_err(system("socket"))?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            let errno = error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw);
            return Err(ChannelError::System { call: "unlink", errno });
        }
        _ => {}
    }
    let address = UnixAddr::new(path).map_err(system("socket path"))?;
    let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let bound = bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address);
    nix::sys::stat::umask(old);
    bound.map_err(system("bind"))?;
    // Both ways have room for a burst of registrations; too little is an error, not a wait.
    setsockopt(&fd, sockopt::SndBuf, &(1 << 20)).map_err(system("SO_SNDBUF"))?;
    nix::sys::socket::listen(&fd, Backlog::new(16).unwrap_or(Backlog::MAXCONN))
        .map_err(system("listen"))?;
    Ok(fd)
}
