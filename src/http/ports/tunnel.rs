//! A connection to a port inside the guest, carried by one request to its agent.

use std::time::Duration;

use axum::http::{Method, Request, StatusCode};
use guest_agent::client::{AgentClient, AgentError, RequestBody};
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::Frame;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio_util::io::ReaderStream;

use crate::http::error::{ApiError, ErrorCode};

const OPEN_DEADLINE: Duration = Duration::from_secs(15);
/// What is under way in each direction.
const BUFFER: usize = 64 << 10;
const MAX_ERROR: usize = 64 << 10;

/// Opens a connection to `port` on the guest's loopback.
pub(super) async fn open(agent: &AgentClient, port: u16) -> Result<DuplexStream, ApiError> {
    let (ours, theirs) = tokio::io::duplex(BUFFER);
    let (up, mut down) = tokio::io::split(theirs);
    let body =
        StreamBody::new(futures_util::TryStreamExt::map_ok(ReaderStream::new(up), Frame::data));
    let body: RequestBody = body.map_err(|e| Box::new(e) as _).boxed_unsync();
    let request = Request::builder().method(Method::POST).uri(format!("/tunnel?port={port}"));
    let request = request.body(body).map_err(|e| ApiError::malformed(e.to_string()))?;
    let deadline = || AgentError::Timeout { call: "/tunnel".to_owned(), deadline: OPEN_DEADLINE };
    let answer = tokio::time::timeout(OPEN_DEADLINE, agent.send(request));
    let answer = answer.await.map_err(|_| deadline())??;
    if !answer.status().is_success() {
        let status = answer.status();
        let bytes = Limited::new(answer.into_body(), MAX_ERROR).collect().await;
        let bytes = bytes.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let said = serde_json::from_slice::<guest_agent::wire::ErrorBody>(&bytes);
        return Err(match said {
            Ok(error) => {
                ApiError::new(status, ErrorCode::of_agent(&error.error_code), error.message)
            }
            Err(_) => {
                let message = format!("the guest answered {status} without saying why");
                ApiError::new(StatusCode::BAD_GATEWAY, ErrorCode::GUEST_UNREACHABLE, message)
            }
        });
    }
    let mut from_guest = answer.into_body();
    tokio::spawn(async move {
        while let Some(Ok(frame)) = from_guest.frame().await {
            let Ok(data) = frame.into_data() else { continue };
            if down.write_all(&data).await.is_err() {
                return;
            }
        }
        let _ = down.shutdown().await;
    });
    Ok(ours)
}
