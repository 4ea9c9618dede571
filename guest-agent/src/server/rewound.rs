//! A stream some of which was read already, to find out what is spoken on it.

use crate::question::HEAD;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The stream, with what was read in front of it again.
#[derive(Debug)]
pub struct Rewound<S> {
    head: [u8; HEAD],
    /// Bytes of the head that were given out.
    given: usize,
    inner: S,
}

impl<S> Rewound<S> {
    /// `inner` with `head` in front.
    pub fn new(head: [u8; HEAD], inner: S) -> Self {
        Self { head, given: 0, inner }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.given < HEAD {
            let rest = &self.head[self.given..];
            let n = rest.len().min(buf.remaining());
            buf.put_slice(&rest[..n]);
            self.given += n;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
