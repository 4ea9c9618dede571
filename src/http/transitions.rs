//! `/v1/sandboxes/{id}/pause`, `/resume`, `/fork`.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::App;
use super::error::ApiError;
use super::json::JsonBody;
use super::sandboxes::{SandboxView, timeout};

/// Clones per request.
const MAX_CLONES: u32 = 100;

/// A body that must be empty or an empty object.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoFields {}

/// `POST /v1/sandboxes/{id}/pause`: to disk, memory freed.
pub async fn pause(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(NoFields {}): JsonBody<NoFields>,
) -> Result<Response, ApiError> {
    let sandbox = app.engine.pause(&id).await?;
    Ok(SandboxView::new(&sandbox, None).reply(StatusCode::OK))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResumeBody {
    timeout_seconds: Option<u64>,
}

/// `POST /v1/sandboxes/{id}/resume`: back, same processes, new access token.
pub async fn resume(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ResumeBody>,
) -> Result<Response, ApiError> {
    let timeout = body.timeout_seconds.map(|t| timeout(&app, t)).transpose()?;
    let (sandbox, token) = app.engine.resume(&id, timeout).await?;
    Ok(SandboxView::new(&sandbox, Some(token)).reply(StatusCode::OK))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkBody {
    #[serde(default = "one")]
    count: u32,
}

fn one() -> u32 {
    1
}

/// `POST /v1/sandboxes/{id}/fork`: clones, each with an identity of its own or an error.
pub async fn fork(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ForkBody>,
) -> Result<Response, ApiError> {
    if body.count == 0 || body.count > MAX_CLONES {
        let message = format!("count: {} is not between 1 and {MAX_CLONES}", body.count);
        return Err(ApiError::invalid(message));
    }
    let clones = app.engine.fork(&id, body.count).await?;
    let items: Vec<Value> = clones
        .into_iter()
        .map(|clone| match clone {
            Ok(created) => {
                let view = SandboxView::new(&created.sandbox, Some(created.access_token));
                serde_json::to_value(view).unwrap_or_default()
            }
            Err(e) => json!({"error": ApiError::from(e).as_part()}),
        })
        .collect();
    Ok((StatusCode::CREATED, Json(json!({"items": items}))).into_response())
}
