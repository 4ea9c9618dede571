//! The virtio-serial port as an asynchronous stream that hosts come to and go from.
//!
//! Two things are peculiar. Without a host a read returns 0 at once, for as long as none is there,
//! and poll reports a hang-up. A runtime takes a hang-up to be final, so the port is watched by an
//! edge-triggered epoll instance of its own, and only that instance is given to the runtime: it
//! becomes readable when something about the port changes, and never hangs up.

use crate::wire::PORT_NAME;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// Finds the agent's port by its name; which number it has depends on the machine.
///
/// # Errors
/// There is none.
pub fn find() -> io::Result<PathBuf> {
    let class = Path::new("/sys/class/virtio-ports");
    for entry in fs::read_dir(class)?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio port named {PORT_NAME}")))
}

/// The open port.
#[derive(Debug)]
pub struct Port {
    file: File,
    epoll: Epoll,
    /// Readable when something about the port has changed.
    changes: AsyncFd<OwnedFd>,
    /// The absence of a host was reported as an end; the next read waits for one.
    end_reported: bool,
}

impl Port {
    /// Opens the port.
    ///
    /// # Errors
    /// It is in use, or not there.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        epoll.add(&file, EpollEvent::new(flags, 0))?;
        let watched = epoll.0.try_clone()?;
        let changes = crate::watch::watch(watched, Interest::READABLE)?;
        Ok(Self { file, epoll, changes, end_reported: false })
    }

    /// Waits until something about the port has changed since the last call. There is one waker
    /// for both directions, which is enough: reads and writes come from one task.
    fn poll_change(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut ready = ready!(self.changes.poll_read_ready(cx))?;
        let mut events = [EpollEvent::empty()];
        let n = self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
        ready.clear_ready();
        if n == 0 {
            drop(ready);
            // Taken already: register for the next change.
            return match self.changes.poll_read_ready(cx)? {
                Poll::Ready(_) => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                Poll::Pending => Poll::Pending,
            };
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.file.read(buf.initialize_unfilled()) {
                Ok(0) if this.end_reported => {}
                Ok(n) => {
                    this.end_reported = n == 0;
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                // A host is there and silent. Should it leave, that is an end again.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    this.end_reported = false;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Poll::Ready(Err(error)),
            }
            ready!(this.poll_change(cx))?;
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            match this.file.write(data) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => return Poll::Ready(result),
            }
            ready!(this.poll_change(cx))?;
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
