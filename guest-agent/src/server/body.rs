//! Bodies: what the agent answers with, and reading what it is sent.

use super::ApiError;
use crate::wire::codes;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::{Frame, Incoming, SizeHint};
use serde::de::DeserializeOwned;
use std::io::{self, Read};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// Piece a file is sent in.
const FILE_CHUNK: usize = 64 * 1024;
/// JSON bodies are never larger than this.
const MAX_JSON: usize = 1024 * 1024;

/// Body of an answer.
#[derive(Debug)]
pub enum Body {
    /// All there is, already.
    Full(Option<Bytes>),
    /// Pieces from another task.
    Stream(mpsc::Receiver<io::Result<Bytes>>),
    /// A file, read as the other side takes it.
    File {
        /// Open at its start.
        file: std::fs::File,
        /// Bytes still to send.
        left: u64,
    },
}

impl Body {
    /// A body without bytes.
    pub fn empty() -> Self {
        Self::Full(None)
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut *self {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Stream(pieces) => pieces.poll_recv(cx).map(|p| p.map(|p| p.map(Frame::data))),
            Self::File { left: 0, .. } => Poll::Ready(None),
            Self::File { file, left } => {
                let size = usize::try_from(*left).unwrap_or(FILE_CHUNK).min(FILE_CHUNK);
                let mut chunk = vec![0; size];
                Poll::Ready(Some(match file.read(&mut chunk) {
                    // The length was announced: a shorter file is an error, not an early end.
                    Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(n) => {
                        chunk.truncate(n);
                        *left -= n as u64;
                        Ok(Frame::data(chunk.into()))
                    }
                    Err(error) => Err(error),
                }))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Full(None) | Self::File { left: 0, .. })
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Stream(_) => SizeHint::default(),
            Self::File { left, .. } => SizeHint::with_exact(*left),
        }
    }
}

/// Reads a whole body of at most `limit` bytes.
///
/// # Errors
/// 413 when it is longer, 400 when it breaks off.
pub async fn read_limited(mut body: Incoming, limit: usize) -> Result<Bytes, ApiError> {
    let mut all = BytesMut::new();
    let mut only = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| {
            ApiError::new(400, codes::INVALID_REQUEST, format!("the body broke off: {e}"))
        })?;
        let Ok(data) = frame.into_data() else { continue };
        if all.len() + data.len() > limit {
            let text = format!("the body is larger than {limit} bytes");
            return Err(ApiError::new(413, codes::BODY_TOO_LARGE, text));
        }
        // Nearly every body is a single frame, which is then not copied.
        if all.is_empty() && only.is_none() {
            only = Some(data);
        } else {
            if let Some(first) = only.take() {
                all.extend_from_slice(&first);
            }
            all.extend_from_slice(&data);
        }
    }
    Ok(only.unwrap_or_else(|| all.freeze()))
}

/// Reads a JSON body; an empty one counts as `{}`.
///
/// # Errors
/// 400 when it is not what the endpoint takes, 413 when it is too long.
pub async fn read_json<T: DeserializeOwned>(body: Incoming) -> Result<T, ApiError> {
    let bytes = read_limited(body, MAX_JSON).await?;
    let bytes: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
    serde_json::from_slice(bytes).map_err(|e| ApiError::invalid_json(&e))
}
