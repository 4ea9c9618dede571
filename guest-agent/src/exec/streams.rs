//! The three standard streams of a command, as the agent's and as the program's ends.

use super::pty;
use crate::wire::PtySize;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most that is read at once, and so the most output in one frame.
const READ_SIZE: usize = 32 * 1024;

/// A descriptor that is read or written when the kernel says it can be.
pub type Stream = Rc<AsyncFd<OwnedFd>>;

/// The agent's ends.
#[derive(Debug)]
pub struct Ends {
    /// Where standard input is written; `None` when it is empty.
    pub stdin: Option<Stream>,
    /// Where standard output (or the terminal) is read.
    pub stdout: Stream,
    /// Where standard error is read; `None` on a terminal.
    pub stderr: Option<Stream>,
    /// The terminal.
    pub terminal: Option<Stream>,
}

/// The program's ends.
#[derive(Debug)]
pub struct ChildEnds {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl ChildEnds {
    /// The descriptors, in order.
    pub fn borrow(&self) -> [BorrowedFd<'_>; 3] {
        [self.stdin.as_fd(), self.stdout.as_fd(), self.stderr.as_fd()]
    }
}

/// Descriptors 0 to 2 are targets in the child, so none of them may be a source.
fn above_two(fd: OwnedFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() > 2 {
        return Ok(fd);
    }
    let copy = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(3))?;
    // SAFETY: fcntl made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

fn watch(fd: OwnedFd, interest: Interest) -> io::Result<Stream> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(Rc::new(crate::watch::watch(fd, interest)?))
}

/// Makes the streams of a command without a terminal.
///
/// # Errors
/// No descriptors left.
pub fn pipes(with_stdin: bool) -> io::Result<(Ends, ChildEnds)> {
    let (child_stdin, stdin) = if with_stdin {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        (read, Some(watch(write, Interest::WRITABLE)?))
    } else {
        (OpenOptions::new().read(true).open("/dev/null")?.into(), None)
    };
    let (stdout, child_stdout) = pipe2(OFlag::O_CLOEXEC)?;
    let (stderr, child_stderr) = pipe2(OFlag::O_CLOEXEC)?;
    let ends = Ends {
        stdin,
        stdout: watch(stdout, Interest::READABLE)?,
        stderr: Some(watch(stderr, Interest::READABLE)?),
        terminal: None,
    };
    let child = ChildEnds {
        stdin: above_two(child_stdin)?,
        stdout: above_two(child_stdout)?,
        stderr: above_two(child_stderr)?,
    };
    Ok((ends, child))
}

/// Makes the streams of a command with a terminal.
///
/// # Errors
/// No terminal left.
pub fn terminal(size: PtySize) -> io::Result<(Ends, ChildEnds)> {
    let (master, slave) = pty::open(size)?;
    let master = watch(master, Interest::READABLE | Interest::WRITABLE)?;
    let slave = above_two(slave)?;
    let child = ChildEnds { stdin: slave.try_clone()?, stdout: slave.try_clone()?, stderr: slave };
    let ends = Ends {
        stdin: Some(Rc::clone(&master)),
        stdout: Rc::clone(&master),
        stderr: None,
        terminal: Some(master),
    };
    Ok((ends, child))
}

thread_local! {
    /// All commands read through one buffer: each read is turned into a frame at once.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_SIZE]);
}

/// Reads what is there and hands it to `take`; an empty slice at the end. A terminal whose program
/// is gone counts as ended.
///
/// # Errors
/// The descriptor fails.
pub async fn read<T>(stream: &AsyncFd<OwnedFd>, mut take: impl FnMut(&[u8]) -> T) -> io::Result<T> {
    loop {
        let mut ready = stream.readable().await?;
        let result = ready.try_io(|fd| {
            BUFFER.with_borrow_mut(|buffer| match nix::unistd::read(fd, buffer) {
                Ok(n) => Ok(take(&buffer[..n])),
                Err(Errno::EIO) => Ok(take(&[])),
                Err(error) => Err(error.into()),
            })
        });
        match result {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

/// Writes all of it, waiting for the reader where needed.
///
/// # Errors
/// The reader is gone.
pub async fn write_all(stream: &AsyncFd<OwnedFd>, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let mut ready = stream.writable().await?;
        match ready.try_io(|fd| Ok(nix::unistd::write(fd, data)?)) {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => data = &data[result?..],
            Err(_would_block) => {}
        }
    }
    Ok(())
}
