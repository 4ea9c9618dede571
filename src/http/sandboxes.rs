//! `/v1/sandboxes`: create, list, get, delete, timeout.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::App;
use super::error::ApiError;
use super::json::JsonBody;
use crate::engine::CreateRequest;
use crate::engine::identity::ItemView;
use crate::engine::lifecycle::Timings;
use crate::engine::sandbox::{OnTimeout, Origin, Sandbox, State as SandboxState};

const DEFAULT_TIMEOUT_SECONDS: u64 = 300;
const MAX_METADATA_ENTRIES: usize = 32;
const MAX_METADATA_KEY: usize = 128;
const MAX_METADATA_VALUE: usize = 1024;
const PAGE_LIMIT: usize = 100;

/// A sandbox as the API shows it.
#[derive(Debug, Serialize)]
pub struct SandboxView {
    id: String,
    template: String,
    state: SandboxState,
    origin: Origin,
    metadata: BTreeMap<String, String>,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    expires_at: OffsetDateTime,
    timeout_seconds: u64,
    on_timeout: OnTimeout,
    vmm: String,
    identity: IdentityView,
    timings_ms: Timings,
    #[serde(skip_serializing_if = "Option::is_none")]
    access_token: Option<String>,
}

#[derive(Debug, Serialize)]
struct IdentityView {
    hostname: String,
    machine_id: String,
    mac: String,
    boot_id: String,
    generation: String,
    items: Vec<ItemView>,
}

impl SandboxView {
    /// The view of a sandbox; the token only where it was just made.
    pub fn new(sandbox: &Sandbox, access_token: Option<String>) -> Self {
        let data = sandbox.data();
        let identity = sandbox.identity();
        Self {
            id: data.id,
            template: data.template,
            state: sandbox.state(),
            origin: data.origin,
            metadata: data.metadata,
            created_at: data.created_at,
            expires_at: data.expires_at,
            timeout_seconds: data.timeout_seconds,
            on_timeout: data.on_timeout,
            vmm: data.vmm,
            identity: IdentityView {
                hostname: identity.values.hostname,
                machine_id: identity.values.machine_id,
                mac: identity.values.mac,
                boot_id: identity.values.boot_id,
                generation: identity.values.generation,
                items: identity.items,
            },
            timings_ms: data.timings_ms,
            access_token,
        }
    }

    /// The reply to a request that made a VM work: body, and the phases as `Server-Timing`.
    pub fn reply(self, status: StatusCode) -> Response {
        let mut phases = String::new();
        for (phase, ms) in &self.timings_ms {
            let comma = if phases.is_empty() { "" } else { ", " };
            let _ = write!(phases, "{comma}{phase};dur={ms}");
        }
        let mut response = (status, Json(self)).into_response();
        if let Ok(value) = HeaderValue::from_str(&phases) {
            response.headers_mut().insert("server-timing", value);
        }
        response
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateBody {
    template: String,
    timeout_seconds: Option<u64>,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    on_timeout: OnTimeout,
}

/// Checks a life time against the service's limit.
pub fn timeout(app: &App, seconds: u64) -> Result<Duration, ApiError> {
    let max = app.engine.config().max_timeout.as_secs();
    if seconds == 0 || seconds > max {
        let message = format!("timeout_seconds: {seconds} is not between 1 and {max}");
        return Err(ApiError::invalid(message));
    }
    Ok(Duration::from_secs(seconds))
}

fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), ApiError> {
    if metadata.len() > MAX_METADATA_ENTRIES {
        let message = format!(
            "metadata: {} entries, at most {MAX_METADATA_ENTRIES} are kept",
            metadata.len()
        );
        return Err(ApiError::invalid(message));
    }
    for (key, value) in metadata {
        if key.is_empty() || key.len() > MAX_METADATA_KEY {
            let message =
                format!("metadata: key {key:?} is not between 1 and {MAX_METADATA_KEY} bytes long");
            return Err(ApiError::invalid(message));
        }
        if value.len() > MAX_METADATA_VALUE {
            let message = format!(
                "metadata.{key}: {} bytes, at most {MAX_METADATA_VALUE} are kept",
                value.len()
            );
            return Err(ApiError::invalid(message));
        }
    }
    Ok(())
}

/// Checks the names and values of environment variables.
pub fn check_env(env: &BTreeMap<String, String>) -> Result<(), ApiError> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) {
            let message = format!("env: {name:?} is not a name: it must not be empty or hold '='");
            return Err(ApiError::invalid(message));
        }
        if value.contains('\0') {
            return Err(ApiError::invalid(format!("env.{name}: the value holds a NUL")));
        }
    }
    Ok(())
}

/// `POST /v1/sandboxes`
pub async fn create(
    State(app): State<App>,
    JsonBody(body): JsonBody<CreateBody>,
) -> Result<Response, ApiError> {
    let timeout = timeout(&app, body.timeout_seconds.unwrap_or(DEFAULT_TIMEOUT_SECONDS))?;
    check_metadata(&body.metadata)?;
    check_env(&body.env)?;
    let request = CreateRequest {
        template: body.template,
        timeout,
        on_timeout: body.on_timeout,
        metadata: body.metadata,
        env: body.env,
    };
    let created = app.engine.create(request).await?;
    let view = SandboxView::new(&created.sandbox, Some(created.access_token));
    Ok(view.reply(StatusCode::CREATED))
}

#[derive(Debug, Deserialize)]
pub struct ListQuery {
    limit: Option<usize>,
    next_token: Option<String>,
    template: Option<String>,
    #[serde(flatten)]
    others: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
pub struct ListReply {
    items: Vec<SandboxView>,
    next_token: Option<String>,
}

/// `GET /v1/sandboxes`: newest first; `limit`, `next_token`, `template`, `metadata.KEY` filter.
pub async fn list(
    State(app): State<App>,
    query: Result<Query<ListQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<ListReply>, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::malformed(e.body_text()))?;
    let limit = query.limit.unwrap_or(PAGE_LIMIT);
    if limit == 0 || limit > PAGE_LIMIT {
        let message = format!("limit: {limit} is not between 1 and {PAGE_LIMIT}");
        return Err(ApiError::invalid(message));
    }
    let mut wanted = Vec::new();
    for (name, value) in &query.others {
        let Some(key) = name.strip_prefix("metadata.") else {
            let message = format!(
                "{name}: unknown parameter; limit, next_token, template, metadata.KEY are known"
            );
            return Err(ApiError::invalid(message));
        };
        wanted.push((key, value));
    }
    let after = query.next_token.as_deref().map(parse_token).transpose()?;
    let mut items = Vec::new();
    let mut next_token = None;
    for sandbox in app.engine.sandboxes() {
        let data = sandbox.data();
        let position = (std::cmp::Reverse(data.created_at.unix_timestamp_nanos()), data.id.clone());
        let fits = after.as_ref().is_none_or(|after| position > *after)
            && query.template.as_ref().is_none_or(|t| *t == data.template)
            && wanted.iter().all(|(k, v)| data.metadata.get(*k) == Some(*v));
        if !fits {
            continue;
        }
        if items.len() == limit {
            next_token = items.last().map(token_of);
            break;
        }
        items.push(SandboxView::new(&sandbox, None));
    }
    Ok(Json(ListReply { items, next_token }))
}

fn token_of(last: &SandboxView) -> String {
    let text = format!("{} {}", last.created_at.unix_timestamp_nanos(), last.id);
    URL_SAFE_NO_PAD.encode(text)
}

fn parse_token(token: &str) -> Result<(std::cmp::Reverse<i128>, String), ApiError> {
    let parse = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (at, id) = text.split_once(' ')?;
        Some((std::cmp::Reverse(at.parse().ok()?), id.to_owned()))
    };
    parse().ok_or_else(|| {
        ApiError::invalid("next_token: not one that this service gave; leave it out to start over")
    })
}

/// `GET /v1/sandboxes/{id}`
pub async fn get(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<SandboxView>, ApiError> {
    Ok(Json(SandboxView::new(&*app.engine.sandbox(&id)?, None)))
}

/// `DELETE /v1/sandboxes/{id}`
pub async fn delete(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    app.engine.delete(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimeoutBody {
    timeout_seconds: u64,
}

/// `POST /v1/sandboxes/{id}/timeout`: the life time, counted from now.
pub async fn set_timeout(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<TimeoutBody>,
) -> Result<Json<SandboxView>, ApiError> {
    let timeout = timeout(&app, body.timeout_seconds)?;
    app.engine.set_timeout(&id, timeout).await?;
    Ok(Json(SandboxView::new(&*app.engine.sandbox(&id)?, None)))
}
