//! A session as an asynchronous stream, for either end.

use super::codec::{Decoder, Encode, Encoder, MARKER_LEN, Nonce, Step};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Raw bytes read at once: one page of a virtio-serial queue element holds 4 KiB.
const RAW_BUFFER: usize = 16 * 1024;

/// One end of the shared byte stream.
#[derive(Debug)]
pub struct Session<S> {
    inner: Arc<Mutex<Inner<S>>>,
}

/// One connection on the stream: valid until the next marker, whichever end sent it.
#[derive(Debug)]
pub struct SessionIo<S> {
    inner: Arc<Mutex<Inner<S>>>,
    epoch: u64,
}

#[derive(Debug)]
struct Inner<S> {
    stream: S,
    decoder: Decoder,
    encoder: Encoder,
    raw: Box<[u8]>,
    start: usize,
    end: usize,
    /// Marker that ended the current connection and has not been accepted yet.
    marker: Option<Nonce>,
    /// What the last marker said about questions before HTTP/2.
    may_ask: bool,
    epoch: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    /// Wraps a stream; nothing is read or written yet.
    pub fn new(stream: S) -> Self {
        let inner = Inner {
            stream,
            decoder: Decoder::default(),
            encoder: Encoder::default(),
            raw: vec![0; RAW_BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            marker: None,
            may_ask: false,
            epoch: 0,
        };
        Self { inner: Arc::new(Mutex::new(inner)) }
    }

    /// Guest: tells whoever listens that this agent has just started.
    ///
    /// # Errors
    /// The stream cannot be written.
    pub async fn announce(&self) -> io::Result<()> {
        self.send_marker(Nonce::HELLO.marker()).await
    }

    /// Guest: waits for a host's marker, answers it and returns the connection; `None` when the
    /// stream ended first (no host connected).
    ///
    /// # Errors
    /// The stream fails.
    pub async fn accept(&self) -> io::Result<Option<SessionIo<S>>> {
        loop {
            let Some(nonce) = self.next_marker().await? else { return Ok(None) };
            if nonce == Nonce::HELLO {
                continue;
            }
            self.send_marker(nonce.answer()).await?;
            // A newer marker that came meanwhile is found by the connection's first read.
            return Ok(Some(self.connection()));
        }
    }

    /// Host: starts a connection, ignoring all the guest wrote before it saw this host's marker.
    /// `random` yields fresh random bytes.
    ///
    /// # Errors
    /// The stream fails or ends. There is no deadline in here: the caller has one.
    pub async fn connect(
        &self,
        mut random: impl FnMut() -> io::Result<[u8; 16]>,
    ) -> io::Result<SessionIo<S>> {
        let mut wanted = Nonce::from_random(random()?);
        self.send_marker(wanted.marker()).await?;
        loop {
            match self.next_marker().await? {
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(nonce) if nonce == wanted => return Ok(self.connection()),
                Some(Nonce::HELLO) => {
                    // A new agent, which may or may not get to see the marker sent above. Only a
                    // marker of another name tells its answer from the old agent's.
                    wanted = Nonce::from_random(random()?);
                    self.send_marker(wanted.marker()).await?;
                }
                Some(_) => {}
            }
        }
    }

    fn connection(&self) -> SessionIo<S> {
        let epoch = lock(&self.inner).epoch;
        SessionIo { inner: Arc::clone(&self.inner), epoch }
    }

    async fn next_marker(&self) -> io::Result<Option<Nonce>> {
        poll_fn(|cx| {
            let mut inner = lock(&self.inner);
            let mut void = [0u8; 512];
            loop {
                if let Some(nonce) = inner.marker.take() {
                    return Poll::Ready(Ok(Some(nonce)));
                }
                if inner.start == inner.end && ready!(inner.poll_fill(cx))? == 0 {
                    return Poll::Ready(Ok(None));
                }
                inner.decode(&mut void);
            }
        })
        .await
    }

    async fn send_marker(&self, marker: [u8; MARKER_LEN]) -> io::Result<()> {
        let mut sent = 0;
        poll_fn(|cx| {
            let mut inner = lock(&self.inner);
            while sent < marker.len() {
                let n = ready!(Pin::new(&mut inner.stream).poll_write(cx, &marker[sent..]))?;
                if n == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                sent += n;
            }
            inner.encoder.restart();
            ready!(Pin::new(&mut inner.stream).poll_flush(cx))?;
            Poll::Ready(Ok(()))
        })
        .await
    }
}

fn lock<S>(inner: &Mutex<Inner<S>>) -> MutexGuard<'_, Inner<S>> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: AsyncRead + AsyncWrite + Unpin> Inner<S> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(&mut self.raw);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buf))?;
        (self.start, self.end) = (0, buf.filled().len());
        Poll::Ready(Ok(self.end))
    }

    fn decode(&mut self, out: &mut [u8]) -> usize {
        let Step { consumed, produced, marker, may_ask } =
            self.decoder.decode(&self.raw[self.start..self.end], out);
        self.start += consumed;
        if marker.is_some() {
            self.marker = marker;
            self.may_ask = may_ask;
            self.epoch += 1;
        }
        produced
    }

    /// Fails once the connection of `epoch` has been ended by a marker or by garbage.
    fn check(&self, epoch: u64) -> io::Result<()> {
        if self.epoch == epoch { Ok(()) } else { Err(io::ErrorKind::ConnectionReset.into()) }
    }
}

impl<S> SessionIo<S> {
    /// Whether the other end takes a question before HTTP/2.
    pub fn may_ask(&self) -> bool {
        lock(&self.inner).may_ask
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for SessionIo<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = lock(&self.inner);
        inner.check(self.epoch)?;
        loop {
            if inner.start == inner.end && ready!(inner.poll_fill(cx))? == 0 {
                return Poll::Ready(Ok(()));
            }
            let produced = inner.decode(buf.initialize_unfilled());
            inner.check(self.epoch)?;
            if produced > 0 {
                buf.advance(produced);
                return Poll::Ready(Ok(()));
            }
            if buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for SessionIo<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut inner = lock(&self.inner);
        let inner = &mut *inner;
        inner.check(self.epoch)?;
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        loop {
            match inner.encoder.next(data) {
                Encode::Stuff => {
                    let n = ready!(Pin::new(&mut inner.stream).poll_write(cx, &Encoder::STUFFING))?;
                    if n == 0 {
                        return Poll::Ready(Ok(0));
                    }
                    inner.encoder.restart();
                }
                Encode::Plain(len) => {
                    let n = ready!(Pin::new(&mut inner.stream).poll_write(cx, &data[..len]))?;
                    inner.encoder.wrote(&data[..n]);
                    return Poll::Ready(Ok(n));
                }
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut lock(&self.inner).stream).poll_flush(cx)
    }

    /// The stream outlives its connections: only what is buffered goes out.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}
