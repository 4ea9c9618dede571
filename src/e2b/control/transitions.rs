//! Pause, connect (which is resume), timeout, fork, kill.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::body::with_memory;
use super::view::{Place, created};
use crate::engine::sandbox::{Sandbox, State as SandboxState};
use crate::engine::{SandboxError, TokenChoice, TransitionError};
use crate::http::App;
use crate::http::error::ApiError;
use crate::http::idempotency;
use crate::http::json::JsonBody;
use crate::http::sandboxes::timeout;
use crate::http::transitions::MAX_CLONES;

/// `DELETE /sandboxes/{id}`
pub async fn kill(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    app.engine.delete(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Deserialize)]
pub struct PauseBody {
    memory: Option<bool>,
}

/// `POST /sandboxes/{id}/pause`; 409 when it is paused already.
pub async fn pause(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<PauseBody>,
) -> Result<StatusCode, ApiError> {
    with_memory("memory", body.memory)?;
    app.engine.pause(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Deserialize)]
pub struct ConnectBody {
    timeout: Option<u64>,
    memory: Option<bool>,
}

/// Brings a sandbox back if it is paused. The token stays as it was: other clients may hold it, and
/// the one that resumes does not look at the reply for another.
async fn awaken(
    app: &App,
    id: &str,
    timeout: Option<Duration>,
) -> Result<(StatusCode, Arc<Sandbox>), ApiError> {
    let sandbox = app.engine.sandbox(id)?;
    if sandbox.state() == SandboxState::Running {
        return Ok((StatusCode::OK, sandbox));
    }
    match app.engine.resume(id, timeout, TokenChoice::Same).await {
        Ok((sandbox, _)) => Ok((StatusCode::CREATED, sandbox)),
        // Somebody else brought it back meanwhile.
        Err(TransitionError::Sandbox(SandboxError::WrongState {
            state: SandboxState::Running,
            ..
        })) => Ok((StatusCode::OK, sandbox)),
        Err(e) => Err(e.into()),
    }
}

/// `POST /sandboxes/{id}/connect`: 201 when it had to be brought back, 200 when it runs; then its
/// life is made longer where the client wishes it to be, never shorter.
pub async fn connect(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<ConnectBody>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    with_memory("memory", body.memory)?;
    let timeout = body.timeout.map(|t| timeout(&app, t)).transpose()?;
    let (status, sandbox) = awaken(&app, &id, timeout).await?;
    if let Some(timeout) = timeout.filter(|_| status == StatusCode::OK) {
        prolong(&app, &sandbox, timeout).await?;
    }
    let token = app.engine.access_token(&sandbox);
    Ok((status, Json(created(&sandbox, token.as_deref(), &Place::of(&headers)))))
}

/// `POST /sandboxes/{id}/resume`, of older clients: 409 when it runs.
pub async fn resume(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<ConnectBody>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let timeout = body.timeout.map(|t| timeout(&app, t)).transpose()?;
    let (sandbox, token) = app.engine.resume(&id, timeout, TokenChoice::Same).await?;
    Ok((StatusCode::CREATED, Json(created(&sandbox, Some(&token), &Place::of(&headers)))))
}

async fn prolong(app: &App, sandbox: &Sandbox, timeout: Duration) -> Result<(), ApiError> {
    let data = sandbox.data();
    if OffsetDateTime::now_utc() + timeout > data.expires_at {
        app.engine.set_timeout(&data.id, timeout).await?;
    }
    Ok(())
}

#[derive(Debug, Deserialize)]
pub struct TimeoutBody {
    timeout: u64,
}

/// `POST /sandboxes/{id}/timeout`: the life time, counted from now.
pub async fn set_timeout(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<TimeoutBody>,
) -> Result<StatusCode, ApiError> {
    let timeout = timeout(&app, body.timeout)?;
    app.engine.set_timeout(&id, timeout).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Deserialize)]
pub struct RefreshBody {
    duration: Option<u64>,
}

/// `POST /sandboxes/{id}/refreshes`: a longer life, never a shorter one.
pub async fn refresh(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<RefreshBody>,
) -> Result<StatusCode, ApiError> {
    let sandbox = app.engine.sandbox(&id)?;
    let seconds = body.duration.unwrap_or(sandbox.data().timeout_seconds);
    prolong(&app, &sandbox, timeout(&app, seconds)?).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Deserialize)]
pub struct ForkBody {
    timeout: Option<u64>,
    count: Option<u32>,
}

/// `POST /sandboxes/{id}/fork`: for each clone the sandbox, or why there is none.
pub async fn fork(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<ForkBody>,
) -> Result<(StatusCode, Json<Vec<Value>>), ApiError> {
    let count = body.count.unwrap_or(1);
    if count == 0 || count > MAX_CLONES {
        let message = format!("count: {count} is not between 1 and {MAX_CLONES}");
        return Err(ApiError::invalid(message));
    }
    let timeout = body.timeout.map(|t| timeout(&app, t)).transpose()?;
    let place = Place::of(&headers);
    let mut items = Vec::new();
    for clone in app.engine.fork(&id, count, idempotency::current()).await?.clones {
        items.push(match clone {
            Ok(clone) => {
                if let Some(timeout) = timeout {
                    app.engine.set_timeout(&clone.sandbox.data().id, timeout).await?;
                }
                json!({ "sandbox": created(&clone.sandbox, Some(&clone.access_token), &place) })
            }
            Err(e) => json!({ "error": ApiError::from(e).into_part() }),
        });
    }
    Ok((StatusCode::CREATED, Json(items)))
}
