//! `/v1/sandboxes/{id}/files?path=`: bytes in and out, streamed both ways, nothing kept here.

use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderName, Method, StatusCode, header};
use axum::response::Response;
use guest_agent::client::{AgentClient, RequestBody};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use utoipa::IntoParams;

use super::App;
use super::error::{ApiError, ErrorCode};
use super::exec::agent_of;

/// Request headers that mean something to the agent.
const PASSED_IN: &[HeaderName] =
    &[header::CONTENT_TYPE, header::CONTENT_LENGTH, header::ACCEPT, header::RANGE];
/// Longest error body read from a guest.
const MAX_ERROR: usize = 64 << 10;
/// How long a guest may take to answer; how long the bytes may take is the client's business.
const ANSWER_DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);

/// Which file
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct FileQuery {
    /// Absolute path in the guest, without `.` and `..`
    #[param(pattern = r"^/([^/\x00]{1,255}/?)*$", max_length = 4095)]
    path: String,
}

/// Read a file, or a folder as an archive
#[utoipa::path(get, path = "/sandboxes/{id}/files", tag = "sandboxes", operation_id = "read_file",
    params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$"), FileQuery,
        ("Accept" = Option<String>, Header, description = "`application/x-tar` for a folder")),
    responses((status = 200, description = "Its bytes", content(
            (Vec<u8> = "application/octet-stream"), (Vec<u8> = "application/x-tar"))),
        (status = 400, description = "`invalid_path`"),
        (status = 404, description = "`sandbox_not_found`, `file_not_found`"),
        (status = 409, description = "`wrong_state`, `is_a_directory`, `not_a_file`"),
        (status = 502, description = "`guest_unreachable`"),
        (status = 504, description = "`guest_timeout`")))]
pub async fn get(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    pass(&app, &id, request).await
}

/// Write a file with its folders, or unpack an archive into a folder
#[utoipa::path(put, path = "/sandboxes/{id}/files", tag = "sandboxes", operation_id = "write_file",
    params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$"), FileQuery),
    request_body(content((Vec<u8> = "application/octet-stream"), (Vec<u8> = "application/x-tar"))),
    responses((status = 200, description = "What was written", body = Object),
        (status = 204, description = "Written"),
        (status = 400, description = "`invalid_path`, `entry_escapes`"),
        (status = 403, description = "`permission_denied`"),
        (status = 404, description = "`sandbox_not_found`"),
        (status = 409, description = "`wrong_state`, `is_a_directory`, `not_a_directory`"),
        (status = 502, description = "`guest_unreachable`"),
        (status = 507, description = "`disk_full`")))]
pub async fn put(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    pass(&app, &id, request).await
}

/// Remove a file, or a folder and all in it
#[utoipa::path(delete, path = "/sandboxes/{id}/files", tag = "sandboxes",
    operation_id = "delete_file",
    params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$"), FileQuery,
        ("recursive" = Option<bool>, Query, description = "Needed for a folder that is not empty")),
    responses((status = 204, description = "It is gone"),
        (status = 400, description = "`invalid_path`"),
        (status = 403, description = "`permission_denied`"),
        (status = 404, description = "`sandbox_not_found`, `file_not_found`"),
        (status = 409, description = "`wrong_state`, `not_a_directory`"),
        (status = 502, description = "`guest_unreachable`"),
        (status = 504, description = "`guest_timeout`")))]
pub async fn delete(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let query = Query::<FileQuery>::try_from_uri(request.uri());
    if query.is_ok_and(|q| q.path.starts_with('/') && q.path.bytes().all(|b| b == b'/')) {
        return Err(ApiError::invalid("path: the root folder cannot be removed"));
    }
    pass(&app, &id, request).await
}

async fn pass(app: &App, id: &str, request: Request) -> Result<Response, ApiError> {
    let sandbox = app.engine.sandbox(id)?;
    let agent = agent_of(&sandbox, "files")?;
    let in_use = sandbox.in_use();
    let query = request.uri().query().unwrap_or_default();
    if !query.split('&').any(|p| p.starts_with("path=") && p.len() > 5) {
        return Err(ApiError::invalid("path: missing; ask for /files?path=/absolute/path"));
    }
    let uri = format!("/files?{query}");
    let response = forward(&agent, request, &uri).await?;
    // Held until the last byte has gone.
    Ok(response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _ = &in_use;
            frame
        }))
    }))
}

/// Passes a request to the agent and its answer back.
pub async fn forward(
    agent: &AgentClient,
    request: Request,
    uri: &str,
) -> Result<Response, ApiError> {
    let (head, body) = request.into_parts();
    let mut builder = axum::http::Request::builder().method(head.method).uri(uri);
    for name in PASSED_IN {
        if let Some(value) = head.headers.get(name) {
            builder = builder.header(name, value);
        }
    }
    let body: RequestBody = body.map_err(|e| Box::new(e) as _).boxed_unsync();
    let request = builder.body(body).map_err(|e| ApiError::malformed(e.to_string()))?;
    // An upload is answered when its last byte is in: no deadline fits every size, so it is the
    // connection's end that ends it.
    let answer = if request.method() == Method::PUT {
        agent.send(request).await?
    } else {
        tokio::time::timeout(ANSWER_DEADLINE, agent.send(request)).await.map_err(|_| {
            let message = format!("the guest did not answer within {ANSWER_DEADLINE:?}");
            ApiError::new(StatusCode::GATEWAY_TIMEOUT, ErrorCode::GUEST_TIMEOUT, message)
        })??
    };
    if !answer.status().is_success() {
        return Err(refused(answer).await);
    }
    let (head, body) = answer.into_parts();
    let mut response = Response::new(Body::new(body));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    Ok(response)
}

/// Why the guest said no.
pub async fn refused(answer: Response<Incoming>) -> ApiError {
    let status = answer.status();
    let bytes = Limited::new(answer.into_body(), MAX_ERROR).collect().await;
    let bytes = bytes.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    match serde_json::from_slice::<guest_agent::wire::ErrorBody>(&bytes) {
        Ok(error) => ApiError::new(status, ErrorCode::of_agent(&error.error_code), error.message),
        Err(_) => ApiError::new(
            StatusCode::BAD_GATEWAY,
            ErrorCode::GUEST_UNREACHABLE,
            format!("the guest answered {status} without saying why"),
        ),
    }
}
