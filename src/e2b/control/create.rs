//! `POST /sandboxes`

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::Value;

use super::body::Unsupported;
use super::view::{Place, created};
use crate::engine::CreateRequest;
use crate::engine::sandbox::OnTimeout;
use crate::http::App;
use crate::http::error::ApiError;
use crate::http::idempotency;
use crate::http::json::JsonBody;
use crate::http::sandboxes::{DEFAULT_TIMEOUT_SECONDS, check_env, check_metadata, timeout};

/// The body.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CreateBody {
    #[serde(rename = "templateID")]
    template: String,
    timeout: Option<u64>,
    auto_pause: Option<bool>,
    metadata: Option<BTreeMap<String, String>>,
    env_vars: Option<BTreeMap<String, String>>,
    #[serde(flatten)]
    unsupported: Unsupported,
}

/// The handler.
pub async fn create(
    State(app): State<App>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<CreateBody>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    body.unsupported.check()?;
    let timeout = timeout(&app, body.timeout.unwrap_or(DEFAULT_TIMEOUT_SECONDS))?;
    let metadata = body.metadata.unwrap_or_default();
    let env = body.env_vars.unwrap_or_default();
    check_metadata(&metadata)?;
    check_env(&env)?;
    let on_timeout = if body.auto_pause == Some(true) { OnTimeout::Pause } else { OnTimeout::Kill };
    let request = CreateRequest {
        template: body.template,
        timeout,
        on_timeout,
        metadata,
        env,
        idle_timeout: None,
        made_by: idempotency::current(),
    };
    let made = app.engine.create(request).await?;
    let view = created(&made.sandbox, Some(&made.access_token), &Place::of(&headers));
    Ok((StatusCode::CREATED, Json(view)))
}
