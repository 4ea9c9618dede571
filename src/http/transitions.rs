//! `/v1/sandboxes/{id}/pause`, `/resume`, `/fork`.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::App;
use super::error::{ApiError, Refusal};
use super::idempotency;
use super::json::JsonBody;
use super::sandboxes::{SandboxView, server_timing, timeout};
use crate::engine::TokenChoice;

/// Clones per request.
pub const MAX_CLONES: u32 = 100;

/// Nothing
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NoFields {}

/// Put a sandbox to disk and free its memory
#[utoipa::path(post, path = "/sandboxes/{id}/pause", tag = "sandboxes",
    operation_id = "pause_sandbox", params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$")),
    request_body = Option<NoFields>,
    responses((status = 200, description = "The sandbox, paused", body = SandboxView,
            headers(("Server-Timing" = String, description = "Phases and their milliseconds"))),
        (status = 404, description = "`sandbox_not_found`"),
        (status = 409, description = "`wrong_state`")))]
pub async fn pause(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(NoFields {}): JsonBody<NoFields>,
) -> Result<Response, ApiError> {
    let sandbox = app.engine.pause(&id).await?;
    Ok(SandboxView::new(&sandbox, None).reply(StatusCode::OK))
}

/// How a sandbox comes back
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Resume)]
pub struct ResumeBody {
    /// Life time from now; as it was when absent
    #[schema(minimum = 1, maximum = 2_592_000)]
    timeout_seconds: Option<u64>,
}

/// Bring a paused sandbox back: the same processes, a new access token
#[utoipa::path(post, path = "/sandboxes/{id}/resume", tag = "sandboxes",
    operation_id = "resume_sandbox", params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$")),
    request_body = Option<ResumeBody>,
    responses((status = 200, description = "The sandbox, with its token", body = SandboxView,
            headers(("Server-Timing" = String, description = "Phases and their milliseconds"))),
        (status = 404, description = "`sandbox_not_found`"),
        (status = 409, description = "`wrong_state`")))]
pub async fn resume(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ResumeBody>,
) -> Result<Response, ApiError> {
    let timeout = body.timeout_seconds.map(|t| timeout(&app, t)).transpose()?;
    let (sandbox, token) = app.engine.resume(&id, timeout, TokenChoice::New).await?;
    Ok(SandboxView::new(&sandbox, Some(token)).reply(StatusCode::OK))
}

/// How many clones
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Fork)]
pub struct ForkBody {
    /// Clones to make
    #[schema(minimum = 1, maximum = 100)]
    #[serde(default = "one")]
    count: u32,
}

fn one() -> u32 {
    1
}

/// The clones
#[derive(Debug, Serialize, ToSchema)]
pub struct ForkReply {
    /// As many as were asked for
    items: Vec<ForkItem>,
}

/// A clone, or why it is missing
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
enum ForkItem {
    /// A sandbox with an identity of its own
    Made(Box<SandboxView>),
    /// None
    Failed {
        /// Why
        error: Refusal,
    },
}

/// Clone a running sandbox
#[utoipa::path(post, path = "/sandboxes/{id}/fork", tag = "sandboxes",
    operation_id = "fork_sandbox", params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$")),
    request_body = Option<ForkBody>,
    responses((status = 201, description = "The clones", body = ForkReply,
            headers(("Server-Timing" = String, description = "How long the source stood still, and \
                the phases of the whole, in milliseconds"))),
        (status = 404, description = "`sandbox_not_found`"),
        (status = 409, description = "`wrong_state`")))]
pub async fn fork(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ForkBody>,
) -> Result<Response, ApiError> {
    if body.count == 0 || body.count > MAX_CLONES {
        let message = format!("count: {} is not between 1 and {MAX_CLONES}", body.count);
        return Err(ApiError::invalid(message));
    }
    let forked = app.engine.fork(&id, body.count, idempotency::current()).await?;
    let items = forked
        .clones
        .into_iter()
        .map(|clone| match clone {
            Ok(created) => {
                let view = SandboxView::new(&created.sandbox, Some(created.access_token));
                ForkItem::Made(Box::new(view))
            }
            Err(e) => ForkItem::Failed { error: ApiError::from(e).into_part() },
        })
        .collect();
    let timing = server_timing(&forked.timings);
    Ok((StatusCode::CREATED, timing, Json(ForkReply { items })).into_response())
}
