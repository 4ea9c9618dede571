//! Bodies: out of memory or out of a stream, and in as pieces with a limit on silence.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};

use super::ClientError;

/// A request's body.
pub type BoxBody = UnsyncBoxBody<Bytes, std::io::Error>;

/// No body.
pub fn empty() -> BoxBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// A body in memory.
pub fn full(bytes: impl Into<Bytes>) -> BoxBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body that comes in pieces; `sent` grows with them.
pub fn counted(
    pieces: impl Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    sent: Arc<AtomicU64>,
) -> BoxBody {
    let frames = pieces.map(move |piece| {
        piece.map(|bytes| {
            sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            Frame::data(bytes)
        })
    });
    StreamBody::new(frames).boxed_unsync()
}

/// The bytes of a reply, as they come.
#[derive(Debug)]
pub struct Frames {
    body: Incoming,
    url: String,
}

/// What a wait for bytes came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Some bytes.
    Bytes(Bytes),
    /// There are no more.
    End,
    /// Nothing came in the time given; the wait can be taken up again.
    Silence,
}

impl Frames {
    pub(super) fn new(body: Incoming, url: String) -> Self {
        Self { body, url }
    }

    /// The next bytes, or what there is instead.
    pub async fn next_within(&mut self, silence: Duration) -> Result<Next, ClientError> {
        let deadline = tokio::time::Instant::now() + silence;
        loop {
            let Ok(frame) = tokio::time::timeout_at(deadline, self.body.frame()).await else {
                return Ok(Next::Silence);
            };
            match frame {
                None => return Ok(Next::End),
                Some(Ok(frame)) => {
                    // Trailers carry nothing here.
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Next::Bytes(bytes));
                    }
                }
                Some(Err(e)) => {
                    return Err(ClientError::Broken { url: self.url.clone(), reason: reason(&e) });
                }
            }
        }
    }

    /// The next bytes; `None` at the end, an error when they stay away too long.
    pub async fn next(&mut self, silence: Duration) -> Result<Option<Bytes>, ClientError> {
        match self.next_within(silence).await? {
            Next::Bytes(bytes) => Ok(Some(bytes)),
            Next::End => Ok(None),
            Next::Silence => {
                let url = self.url.clone();
                Err(ClientError::NoAnswer { url, what: "more bytes", after: silence })
            }
        }
    }
}

/// An error with its causes: hyper's own text alone says little.
pub fn reason(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
