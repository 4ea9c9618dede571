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
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::idempotency;
use crate::http::json::JsonBody;
use crate::http::sandboxes::{DEFAULT_TIMEOUT_SECONDS, check_env, check_metadata, timeout};
use crate::net::policy::{Internet, Policy};

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
    // The one field whose name has no capitals.
    #[serde(rename = "allow_internet_access")]
    allow_internet_access: Option<bool>,
    #[serde(flatten)]
    unsupported: Unsupported,
}

/// The handler.
pub async fn create(
    State(app): State<App>,
    caller: Caller,
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
    let internet =
        if body.allow_internet_access == Some(false) { Internet::Off } else { Internet::On };
    let request = CreateRequest {
        template: body.template,
        owner: caller.owner(),
        timeout,
        on_timeout,
        metadata,
        env,
        idle_timeout: None,
        made_by: idempotency::current(),
        network: Policy { internet, ..Policy::default() },
    };
    let made = app.engine.create(request).await?;
    let view = created(&made.sandbox, Some(&made.access_token), &Place::of(&headers));
    Ok((StatusCode::CREATED, Json(view)))
}
