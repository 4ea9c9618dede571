//! The handshake in which a VMM hands over its guest memory: Firecracker's, and the QEMU shim's.
//!
//! The VMM connects to a unix socket and sends one JSON array of mappings and one userfaultfd,
//! with no length prefix and no reply. A VMM is where a guest lands that breaks out of its VM, so
//! nothing in the message is believed: credentials, sizes, overlaps and the kind of the
//! descriptor are all checked, and every wait has a deadline. The socket stays open for the life
//! of the VMM, and its hang-up is how the VMM's death is noticed.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::region::RegionError;
use crate::{fdpass, pidfd, region, uffd};

pub use crate::region::Region;

/// Longest handshake accepted; Firecracker's needs about 130 bytes per region.
const MAX_MESSAGE: usize = 64 << 10;
/// Most descriptors a handshake may carry; today's VMMs send one.
const MAX_HANDSHAKE_FDS: usize = 8;

/// What the VMM sent, checked.
#[derive(Debug)]
pub struct Handshake {
    /// Guest memory, covering the memory file exactly.
    pub regions: Vec<Region>,
    /// The VMM's userfaultfd.
    pub uffd: OwnedFd,
    /// The connection: it hangs up when the VMM ends.
    pub peer: UnixStream,
    /// Process that connected (`SO_PEERCRED`).
    pub peer_pid: i32,
}

/// What the service knows about the VMM it started.
#[derive(Clone, Debug, Default)]
pub struct Expect {
    /// Size of the guest's memory and of its memory file.
    pub memory_bytes: u64,
    /// User the VMM runs as.
    pub peer_uid: Option<u32>,
    /// Process id of the VMM.
    pub peer_pid: Option<i32>,
}

/// Why there is no handshake.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// Nobody with the right credentials connected in time.
    #[error("no VMM connected within {waited:?} ({refused} connection(s) of others refused)")]
    NobodyCame {
        /// How long was waited.
        waited: Duration,
        /// Connections closed because user or process was not the expected one.
        refused: u32,
    },
    /// The VMM ended instead.
    #[error("the VMM (pid {0}) ended before it handed over its memory")]
    VmmEnded(i32),
    /// The VMM connected and did not finish its message in time.
    #[error(
        "the VMM (pid {pid}) sent {bytes} byte(s) and {fds} descriptor(s), then nothing for the rest of {waited:?}"
    )]
    TimedOut {
        /// Connected process.
        pid: i32,
        /// Bytes received.
        bytes: usize,
        /// Descriptors received.
        fds: usize,
        /// How long was waited.
        waited: Duration,
    },
    /// The VMM hung up in the middle of its message.
    #[error(
        "the VMM (pid {pid}) closed the connection after {bytes} byte(s) and {fds} descriptor(s)"
    )]
    Closed {
        /// Connected process.
        pid: i32,
        /// Bytes received.
        bytes: usize,
        /// Descriptors received.
        fds: usize,
    },
    /// The message is longer than any real one.
    #[error("handshake longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// The message is not the JSON array it has to be.
    #[error("handshake is not a list of memory regions: {0}")]
    NotRegions(String),
    /// More descriptors than any VMM sends, or some that were dropped.
    #[error(
        "handshake carries {0} descriptors or more than fit; at most {MAX_HANDSHAKE_FDS} are taken"
    )]
    TooManyFds(usize),
    /// Not exactly one of the descriptors is a userfaultfd.
    #[error("{found} of {sent} descriptor(s) are userfaultfds; exactly one must be")]
    NotUserfaultfd {
        /// Userfaultfds among them.
        found: usize,
        /// Descriptors sent.
        sent: usize,
    },
    /// The userfaultfd would block whoever reads it.
    #[error("the userfaultfd is in blocking mode")]
    Blocking,
    /// The regions do not describe the guest's memory.
    #[error("memory regions refused: {0}")]
    Regions(#[from] RegionError),
    /// A system call failed.
    #[error("{call}: {errno}")]
    System {
        /// The call.
        call: &'static str,
        /// Its errno.
        errno: Errno,
    },
}

/// Accepts one VMM on the listener, within `deadline`.
///
/// Connections from other users or processes than expected are closed and waiting goes on, so
/// that a stranger cannot take a VMM's place by being early.
pub fn accept(
    listener: &UnixListener,
    expect: &Expect,
    deadline: Duration,
) -> Result<Handshake, HandshakeError> {
    let end = Instant::now() + deadline;
    let mut refused = 0;
    let vmm = match expect.peer_pid {
        Some(pid) => {
            // A zombie still has a handle, and it is readable.
            let handle = pidfd::open(pid).map_err(|_| HandshakeError::VmmEnded(pid))?;
            Some((pid, handle))
        }
        None => None,
    };
    let (peer, peer_pid) = loop {
        match wait_for_peer(listener, vmm.as_ref().map(|(_, handle)| handle), end)? {
            Waited::Peer => {}
            Waited::Deadline => {
                return Err(HandshakeError::NobodyCame { waited: deadline, refused });
            }
            Waited::VmmEnded => {
                return Err(HandshakeError::VmmEnded(vmm.map_or(0, |(pid, _)| pid)));
            }
        }
        let (peer, _) = match listener.accept() {
            Ok(connection) => connection,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(error) => {
                let errno = error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw);
                return Err(HandshakeError::System { call: "accept", errno });
            }
        };
        let who = system("SO_PEERCRED", getsockopt(&peer, PeerCredentials))?;
        let right_user = expect.peer_uid.is_none_or(|uid| uid == who.uid());
        let right_process = expect.peer_pid.is_none_or(|pid| pid == who.pid());
        if right_user && right_process {
            break (peer, who.pid());
        }
        refused += 1;
        tracing::warn!(uid = who.uid(), pid = who.pid(), "handshake from a stranger refused");
    };
    let (regions, fds) = receive(&peer, peer_pid, end, deadline)?;
    let regions = region::validate(regions, expect.memory_bytes)?;
    let uffd = pick_userfaultfd(fds)?;
    Ok(Handshake { regions, uffd, peer, peer_pid })
}

enum Waited {
    Peer,
    VmmEnded,
    Deadline,
}

/// Waits for a connection, but not for one of a VMM that has ended.
fn wait_for_peer(
    listener: &UnixListener,
    vmm: Option<&OwnedFd>,
    end: Instant,
) -> Result<Waited, HandshakeError> {
    loop {
        let mut fds = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        fds.extend(vmm.map(|vmm| PollFd::new(vmm.as_fd(), PollFlags::POLLIN)));
        let left = end.saturating_duration_since(Instant::now());
        match poll(&mut fds, fdpass::poll_timeout(left)) {
            Ok(0) | Err(Errno::EINTR) if Instant::now() < end => {}
            Ok(0) | Err(Errno::EINTR) => return Ok(Waited::Deadline),
            Ok(_) if fds[0].any().unwrap_or(false) => return Ok(Waited::Peer),
            Ok(_) => return Ok(Waited::VmmEnded),
            Err(errno) => return Err(HandshakeError::System { call: "poll", errno }),
        }
    }
}

/// One region as VMMs write it. `page_size_kib` holds bytes, in spite of its name.
#[derive(Deserialize, Serialize)]
struct WireRegion {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

/// Collects bytes until they are a whole JSON array and a descriptor has come, whichever is last.
fn receive(
    peer: &UnixStream,
    pid: i32,
    end: Instant,
    waited: Duration,
) -> Result<(Vec<Region>, Vec<OwnedFd>), HandshakeError> {
    let mut bytes = Vec::new();
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut chunk = vec![0; MAX_MESSAGE];
    loop {
        if let Some(regions) = parse(&bytes)?
            && !fds.is_empty()
        {
            return Ok((regions, fds));
        }
        if !system("poll", fdpass::wait_for(peer.as_fd(), PollFlags::POLLIN, end))? {
            return Err(HandshakeError::TimedOut {
                pid,
                bytes: bytes.len(),
                fds: fds.len(),
                waited,
            });
        }
        let received = match fdpass::receive(peer.as_fd(), &mut chunk) {
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            other => system("recvmsg", other)?,
        };
        fds.extend(received.fds);
        if received.truncated || fds.len() > MAX_HANDSHAKE_FDS {
            return Err(HandshakeError::TooManyFds(fds.len()));
        }
        if received.len == 0 {
            return Err(HandshakeError::Closed { pid, bytes: bytes.len(), fds: fds.len() });
        }
        bytes.extend_from_slice(&chunk[..received.len]);
        if bytes.len() > MAX_MESSAGE {
            return Err(HandshakeError::TooLong);
        }
    }
}

/// The regions, or nothing while the text is a beginning of some.
fn parse(bytes: &[u8]) -> Result<Option<Vec<Region>>, HandshakeError> {
    match serde_json::from_slice::<Vec<WireRegion>>(bytes) {
        Ok(wire) => Ok(Some(
            wire.into_iter()
                .map(|region| Region {
                    base: region.base_host_virt_addr,
                    size: region.size,
                    offset: region.offset,
                    page_size: region.page_size.or(region.page_size_kib).unwrap_or(uffd::PAGE),
                })
                .collect(),
        )),
        Err(error) if error.is_eof() => Ok(None),
        Err(error) => Err(HandshakeError::NotRegions(error.to_string())),
    }
}

fn pick_userfaultfd(fds: Vec<OwnedFd>) -> Result<OwnedFd, HandshakeError> {
    let sent = fds.len();
    let mut found: Vec<OwnedFd> =
        fds.into_iter().filter(|fd| uffd::is_userfaultfd(fd.as_fd())).collect();
    let count = found.len();
    let Some(fd) = found.pop().filter(|_| count == 1) else {
        return Err(HandshakeError::NotUserfaultfd { found: count, sent });
    };
    let flags = system("F_GETFL", fcntl(&fd, FcntlArg::F_GETFL))?;
    if !OFlag::from_bits_truncate(flags).contains(OFlag::O_NONBLOCK) {
        return Err(HandshakeError::Blocking);
    }
    Ok(fd)
}

fn system<T>(call: &'static str, result: Result<T, Errno>) -> Result<T, HandshakeError> {
    result.map_err(|errno| HandshakeError::System { call, errno })
}
