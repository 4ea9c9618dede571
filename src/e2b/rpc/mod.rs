//! The Connect protocol with its JSON codec, as far as a server needs it: unary calls are JSON in
//! and out, streams are enveloped messages over chunked HTTP/1.1.

mod envelope;
mod error;
mod stream;

pub use envelope::Envelopes;
pub use error::{Code, RpcError};
pub use stream::{StreamError, reply};

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Content type of a stream's request and reply.
const STREAM_TYPE: &str = "application/connect+json";

/// The message of a unary call.
#[derive(Debug)]
pub struct Unary<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Unary<T> {
    type Rejection = RpcError;

    async fn from_request(request: Request, state: &S) -> Result<Self, RpcError> {
        require_type(request.headers(), "application/json")?;
        let body = Bytes::from_request(request, state).await;
        let body = body.map_err(|e| RpcError::new(Code::ResourceExhausted, e.body_text()))?;
        parse(&body).map(Self)
    }
}

/// The only message of a stream that the server answers with many.
#[derive(Debug)]
pub struct Opening<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Opening<T> {
    type Rejection = StreamError;

    async fn from_request(request: Request, _: &S) -> Result<Self, StreamError> {
        let mut envelopes = Envelopes::new(request)?;
        let message = envelopes.next().await?.ok_or_else(|| {
            RpcError::new(Code::InvalidArgument, "the stream ended before its message")
        })?;
        Ok(Self(parse(&message)?))
    }
}

/// Reads a message.
pub fn parse<T: DeserializeOwned>(message: &[u8]) -> Result<T, RpcError> {
    // An empty message is one of defaults only.
    let text: &[u8] = if message.is_empty() { b"{}" } else { message };
    let mut parser = serde_json::Deserializer::from_slice(text);
    serde_path_to_error::deserialize(&mut parser)
        .map_err(|e| RpcError::new(Code::InvalidArgument, format!("{}: {}", e.path(), e.inner())))
}

fn require_type(headers: &HeaderMap, wanted: &str) -> Result<(), RpcError> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = given.split(';').next().unwrap_or_default().trim();
    if kind.eq_ignore_ascii_case(wanted) {
        return Ok(());
    }
    let text = format!("content type {given:?} is not spoken here, {wanted} is");
    Err(RpcError::new(Code::Unimplemented, text))
}

/// How long the client will wait for a call's end; `None` for ever.
pub fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let millis = headers.get("connect-timeout-ms")?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_millis(millis)).filter(|timeout| !timeout.is_zero())
}
