//! `/v1/sandboxes/{id}/files?path=`: bytes in and out, streamed both ways, nothing kept here.

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, Method, StatusCode, header};
use axum::response::Response;
use guest_agent::client::{AgentClient, RequestBody};
use http_body_util::{BodyExt, Limited};

use super::App;
use super::error::ApiError;
use super::exec::agent_of;

/// Request headers that mean something to the agent.
const PASSED_IN: &[HeaderName] =
    &[header::CONTENT_TYPE, header::CONTENT_LENGTH, header::ACCEPT, header::RANGE];
/// Longest error body read from a guest.
const MAX_ERROR: usize = 64 << 10;
/// How long a guest may take to answer; how long the bytes may take is the client's business.
const ANSWER_DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);

/// The handler for GET, PUT and DELETE.
pub async fn files(
    State(app): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    if ![Method::GET, Method::HEAD, Method::PUT, Method::DELETE].contains(request.method()) {
        return Err(ApiError::method_not_allowed());
    }
    let agent = agent_of(&app.engine.sandbox(&id)?, "files")?;
    let query = request.uri().query().unwrap_or_default();
    if !query.split('&').any(|p| p.starts_with("path=") && p.len() > 5) {
        return Err(ApiError::invalid("path: missing; ask for /files?path=/absolute/path"));
    }
    let uri = format!("/files?{query}");
    forward(&agent, request, &uri).await
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
            ApiError::new(StatusCode::GATEWAY_TIMEOUT, "guest_timeout", message)
        })??
    };
    let (head, body) = answer.into_parts();
    if !head.status.is_success() {
        let bytes = Limited::new(body, MAX_ERROR).collect().await;
        let bytes = bytes.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        return Err(from_guest(head.status, &bytes));
    }
    let mut response = Response::new(Body::new(body));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    Ok(response)
}

fn from_guest(status: StatusCode, body: &[u8]) -> ApiError {
    match serde_json::from_slice::<guest_agent::wire::ErrorBody>(body) {
        Ok(error) => ApiError::new(status, &error.error_code, error.message),
        Err(_) => ApiError::new(
            StatusCode::BAD_GATEWAY,
            "guest_unreachable",
            format!("the guest answered {status} without saying why"),
        ),
    }
}
