//! A vsock listener: under Firecracker the host dials the agent, one connection at a time or many.

use crate::wire::VSOCK_PORT;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

const BACKLOG: libc::c_int = 16;

/// Accepts connections from the host.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
}

impl Listener {
    /// Listens on the agent's port; `None` where there is no vsock device.
    ///
    /// # Errors
    /// There is one, and the port is taken.
    pub fn bind() -> io::Result<Option<Self>> {
        if !Path::new("/dev/vsock").exists() {
            return Ok(None);
        }
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: a system call without pointers.
        let socket = unsafe { libc::socket(libc::AF_VSOCK, kind, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: an all-zero sockaddr_vm is valid.
        let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = libc::VMADDR_CID_ANY;
        address.svm_port = VSOCK_PORT;
        let len = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        // SAFETY: the address is valid for its length.
        if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a system call without pointers.
        if unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Some(Self { socket: crate::watch::watch(socket, Interest::READABLE)? }))
    }

    /// The next connection.
    ///
    /// # Errors
    /// The listener fails.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let mut ready = self.socket.readable().await?;
            let accepted = ready.try_io(|socket| {
                let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
                let none = std::ptr::null_mut();
                // SAFETY: no address is asked for.
                let fd =
                    unsafe { libc::accept4(socket.as_raw_fd(), none, std::ptr::null_mut(), flags) };
                if fd < 0 {
                    return Err(io::Error::last_os_error());
                }
                // SAFETY: the descriptor was just made and belongs to nobody else.
                Ok(unsafe { OwnedFd::from_raw_fd(fd) })
            });
            match accepted {
                // A connected stream socket reads and writes alike in both families; only names
                // of its ends differ, and nobody asks for them.
                Ok(Ok(fd)) => return UnixStream::from_std(StdUnixStream::from(fd)),
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }
}
