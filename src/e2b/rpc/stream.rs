//! Replies of many messages. The status is 200 whatever happens: how a stream ended is said in its
//! last envelope.

use std::convert::Infallible;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use serde_json::Value;

use super::{RpcError, STREAM_TYPE, envelope};

/// A stream that failed before its first message.
#[derive(Debug)]
pub struct StreamError(RpcError);

impl<E: Into<RpcError>> From<E> for StreamError {
    fn from(e: E) -> Self {
        Self(e.into())
    }
}

impl IntoResponse for StreamError {
    fn into_response(self) -> Response {
        reply(futures_util::stream::iter([Err(self.0)]))
    }
}

/// A stream of these messages; ends with the first error.
pub fn reply(messages: impl Stream<Item = Result<Value, RpcError>> + Send + 'static) -> Response {
    let envelopes = futures_util::stream::unfold(Some(Box::pin(messages)), |messages| async move {
        let mut messages = messages?;
        Some(match messages.next().await {
            Some(Ok(message)) => {
                (envelope::message(message.to_string().as_bytes()), Some(messages))
            }
            Some(Err(error)) => (envelope::end(Some(&error)), None),
            None => (envelope::end(None), None),
        })
    });
    let body = Body::from_stream(envelopes.map(Ok::<_, Infallible>));
    ([(header::CONTENT_TYPE, STREAM_TYPE)], body).into_response()
}
