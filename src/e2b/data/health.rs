//! `GET /health`: 204 while the sandbox runs and its agent answers, 502 when it does not.

use std::time::Duration;

use axum::extract::State;
use axum::http::{Request, StatusCode};

use super::guest::{Refusal, running, sandbox_id};
use crate::http::App;
use crate::http::error::{ApiError, ErrorCode};

/// How long the agent may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// The handler; it asks for no token.
pub async fn health(
    State(app): State<App>,
    request: Request<axum::body::Body>,
) -> Result<StatusCode, Refusal> {
    let (parts, _) = request.into_parts();
    let id = sandbox_id(&parts).ok_or_else(|| {
        ApiError::malformed(
            "which sandbox? name it in the E2b-Sandbox-Id header; the service's own \
                             health is at /healthz",
        )
    })?;
    let guest = running(&app, id)?;
    guest.agent.health(DEADLINE).await.map_err(|e| {
        let message = format!("sandbox {id} runs, but its agent's port is not open: {e}");
        ApiError::new(StatusCode::BAD_GATEWAY, ErrorCode::GUEST_UNREACHABLE, message)
    })?;
    Ok(StatusCode::NO_CONTENT)
}
