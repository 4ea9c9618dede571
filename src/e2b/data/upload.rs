//! Uploads: a body that is the file, or a form whose `file` fields are named by their paths. Both
//! are passed on as they come; a file that does not arrive whole leaves the old one as it was.

use async_compression::tokio::bufread::GzipDecoder;
use axum::body::{Body, Bytes};
use axum::extract::multipart::{Field, Multipart, MultipartError};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use futures_util::{StreamExt, TryStreamExt};
use guest_agent::client::{AgentClient, RequestBody};
use guest_agent::wire::DirEntry;
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::io::{ReaderStream, StreamReader};

use super::files::FilesQuery;
use super::path::{encode, resolve};
use crate::http::error::{ApiError, ErrorCode};
use crate::http::files::refused;

/// Pieces of a form's file on their way to the guest.
const PIECES: usize = 4;
/// Longest answer of the guest to an upload.
const MAX_ANSWER: usize = 1 << 20;
/// Headers with what the uploader notes about its files.
const METADATA: &str = "x-metadata-";

/// Writes what the request holds; says what was written.
pub async fn take(
    agent: &AgentClient,
    query: &FilesQuery,
    request: Request,
) -> Result<Vec<Value>, ApiError> {
    let headers = request.headers().clone();
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = text(header::CONTENT_TYPE).split(';').next().unwrap_or_default().trim();
    match (kind, text(header::CONTENT_ENCODING)) {
        (_, other) if !matches!(other, "" | "identity" | "gzip") => {
            let message = format!("Content-Encoding: {other:?} is not known here, gzip is");
            Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                ErrorCode::UNSUPPORTED_ENCODING,
                message,
            ))
        }
        ("application/octet-stream", encoding) => {
            let path = query.path.as_deref().filter(|path| !path.is_empty());
            let path = path.ok_or_else(|| {
                ApiError::invalid(
                    "path: missing; a body that is no form does not say where it goes",
                )
            })?;
            let body = decoded(request.into_body(), encoding);
            Ok(vec![write(agent, path, query.user(), &headers, body).await?])
        }
        ("multipart/form-data", encoding) => {
            let (parts, body) = request.into_parts();
            let body = Body::new(decoded(body, encoding));
            form(agent, query, &headers, Request::from_parts(parts, body)).await
        }
        (other, _) => {
            let message = format!(
                "Content-Type: {other:?} is neither multipart/form-data nor application/octet-stream"
            );
            Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                ErrorCode::UNSUPPORTED_TYPE,
                message,
            ))
        }
    }
}

/// A body as it was before it was compressed.
fn decoded(body: Body, encoding: &str) -> RequestBody {
    if encoding != "gzip" {
        return body.map_err(|e| Box::new(e) as _).boxed_unsync();
    }
    let bytes = TryStreamExt::map_err(body.into_data_stream(), std::io::Error::other);
    let plain = ReaderStream::new(GzipDecoder::new(StreamReader::new(bytes)));
    let frames = plain.map(|piece| piece.map(Frame::data).map_err(|e| Box::new(e) as _));
    StreamBody::new(frames).boxed_unsync()
}

fn malformed(e: &MultipartError) -> ApiError {
    ApiError::malformed(format!("the form: {}", e.body_text()))
}

async fn form(
    agent: &AgentClient,
    query: &FilesQuery,
    headers: &HeaderMap,
    request: Request,
) -> Result<Vec<Value>, ApiError> {
    let form = Multipart::from_request(request, &()).await;
    let mut form = form.map_err(|e| ApiError::malformed(format!("the form: {}", e.body_text())))?;
    let mut written = Vec::new();
    while let Some(field) = form.next_field().await.map_err(|e| malformed(&e))? {
        if field.name() != Some("file") {
            continue;
        }
        let named = query.path.clone().or_else(|| field.file_name().map(str::to_owned));
        let path = named.filter(|path| !path.is_empty()).ok_or_else(|| {
            ApiError::invalid("path: missing, and the form's file has no name either")
        })?;
        written.push(write_field(agent, &path, query.user(), headers, field).await?);
    }
    if written.is_empty() {
        return Err(ApiError::invalid("file: the form has no field of this name"));
    }
    Ok(written)
}

/// Writes a field of a form, which can only be read where it is.
async fn write_field(
    agent: &AgentClient,
    path: &str,
    user: &str,
    headers: &HeaderMap,
    mut field: Field<'_>,
) -> Result<Value, ApiError> {
    let (sender, mut receiver) = mpsc::channel::<std::io::Result<Bytes>>(PIECES);
    let pieces = futures_util::stream::poll_fn(move |cx| receiver.poll_recv(cx));
    let frames = pieces.map(|piece| piece.map(Frame::data).map_err(|e| Box::new(e) as _));
    let read = async move {
        loop {
            let piece = match field.chunk().await {
                Ok(Some(piece)) => Ok(piece),
                Ok(None) => return Ok(()),
                Err(e) => Err(e),
            };
            let broken = piece.as_ref().err().map(malformed);
            // A guest that takes no more says why in its answer.
            if sender.send(piece.map_err(std::io::Error::other)).await.is_err() {
                return Ok(());
            }
            if let Some(broken) = broken {
                return Err(broken);
            }
        }
    };
    let body = StreamBody::new(frames).boxed_unsync();
    let (read, written) = tokio::join!(read, write(agent, path, user, headers, body));
    read?;
    written
}

async fn write(
    agent: &AgentClient,
    path: &str,
    user: &str,
    headers: &HeaderMap,
    body: RequestBody,
) -> Result<Value, ApiError> {
    let path = resolve(agent, path, user).await?;
    let uri = format!("/files?path={}&user={}", encode(&path), encode(user));
    let mut request = hyper::Request::put(uri);
    for (name, value) in headers {
        if name.as_str().starts_with(METADATA) {
            request = request.header(name, value);
        }
    }
    let request = request.body(body).map_err(|e| ApiError::malformed(e.to_string()))?;
    let answer = agent.send(request).await?;
    if !answer.status().is_success() {
        return Err(refused(answer).await);
    }
    let answer = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
    let answer = answer.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let entry: DirEntry = serde_json::from_slice(&answer).map_err(|e| {
        let message = format!("the guest's answer to an upload: {e}");
        ApiError::new(StatusCode::BAD_GATEWAY, ErrorCode::GUEST_UNREACHABLE, message)
    })?;
    let mut written = json!({ "name": entry.name, "path": path, "type": "file" });
    if !entry.metadata.is_empty() {
        written["metadata"] = json!(entry.metadata);
    }
    Ok(written)
}
