//! `/v1/sandboxes`: create, list, get, delete, timeout.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};

use super::App;
use super::auth::Caller;
use super::error::ApiError;
use super::idempotency;
use super::json::JsonBody;
use super::network::{NetworkView, PolicyBody, internet_schema};
use super::openapi::{env_schema, filters_schema, metadata_schema};
use crate::engine::CreateRequest;
use crate::engine::identity::ItemView;
use crate::engine::lifecycle::Timings;
use crate::engine::sandbox::{OnTimeout, Origin, Sandbox, State as SandboxState};
use crate::net::policy::{Internet, Limits, Policy};

/// Life time of a sandbox whose client names none.
pub const DEFAULT_TIMEOUT_SECONDS: u64 = 300;
/// Labels a sandbox may have.
pub const MAX_METADATA_ENTRIES: usize = 32;
/// Characters of a label's name.
pub const MAX_METADATA_KEY: usize = 128;
/// Characters of a label's value.
pub const MAX_METADATA_VALUE: usize = 1024;
/// Most sandboxes on one page.
pub const PAGE_LIMIT: usize = 100;

/// A sandbox
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Sandbox)]
pub struct SandboxView {
    /// Its id
    #[schema(pattern = "^[a-z0-9]{20}$")]
    id: String,
    /// Its template
    template: String,
    /// What it does now
    state: SandboxState,
    /// Where its machine came from
    origin: Origin,
    #[schema(schema_with = metadata_schema)]
    metadata: BTreeMap<String, String>,
    /// When it was claimed
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// When its time is up
    #[serde(with = "time::serde::rfc3339")]
    expires_at: OffsetDateTime,
    /// Life time asked for
    timeout_seconds: u64,
    /// What happens when it is over
    on_timeout: OnTimeout,
    /// Its time is also up when it was not used for this long
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    idle_timeout_seconds: Option<u64>,
    /// VMM that runs it
    vmm: String,
    /// Where it is, what it may reach, and who may reach it
    network: NetworkView,
    /// What makes it another machine than its siblings
    identity: IdentityView,
    /// Phases of the request that made, resumed or paused it
    #[schema(value_type = BTreeMap<String, f64>)]
    timings_ms: Timings,
    /// When created, resumed or forked, and never again: lets its holder use this sandbox
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    access_token: Option<String>,
}

/// An identity, and the guest's report on each part of it
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Identity)]
struct IdentityView {
    /// Host name
    hostname: String,
    /// `/etc/machine-id`
    machine_id: String,
    /// Hardware address of `eth0`
    mac: String,
    /// `/proc/sys/kernel/random/boot_id`
    boot_id: String,
    /// Name of this identity; new each time one is applied
    generation: String,
    /// The report
    items: Vec<ItemView>,
}

impl SandboxView {
    /// The view of a sandbox; the token only where it was just made.
    pub fn new(sandbox: &Sandbox, access_token: Option<String>) -> Self {
        let data = sandbox.data();
        let identity = sandbox.identity();
        let network = NetworkView::of(&data);
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
            idle_timeout_seconds: data.idle_timeout_seconds,
            vmm: data.vmm,
            network,
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
        let timing = server_timing(&self.timings_ms);
        (status, timing, Json(self)).into_response()
    }
}

/// Phases as the header `Server-Timing`.
pub fn server_timing(timings: &Timings) -> Option<[(&'static str, String); 1]> {
    let phases: Vec<_> = timings.iter().map(|(phase, ms)| format!("{phase};dur={ms}")).collect();
    (!phases.is_empty()).then(|| [("server-timing", phases.join(", "))])
}

/// A sandbox to make
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = CreateSandbox)]
pub struct CreateBody {
    /// What to make it from
    #[schema(example = "base")]
    template: String,
    /// Life time; 300 when absent
    #[schema(minimum = 1, maximum = 2_592_000)]
    timeout_seconds: Option<u64>,
    #[serde(default)]
    #[schema(schema_with = metadata_schema)]
    metadata: BTreeMap<String, String>,
    #[serde(default)]
    #[schema(schema_with = env_schema)]
    env: BTreeMap<String, String>,
    /// What happens when the life time is over
    #[serde(default)]
    on_timeout: OnTimeout,
    /// Its time is also up when no command, file or connection used it for this long
    #[schema(minimum = 1, maximum = 2_592_000)]
    idle_timeout_seconds: Option<u64>,
    #[schema(schema_with = internet_schema)]
    internet: Option<Internet>,
    /// Most that passes in each direction
    network_limits: Option<Limits>,
    /// Ports that anybody may reach through the service, without a token
    #[schema(value_type = Option<Vec<u16>>, max_items = 64)]
    public_ports: Option<BTreeSet<u16>>,
}

/// Checks a life time against the service's limit.
pub fn timeout(app: &App, seconds: u64) -> Result<Duration, ApiError> {
    duration(app, "timeout_seconds", seconds)
}

fn duration(app: &App, field: &str, seconds: u64) -> Result<Duration, ApiError> {
    let max = app.engine.config().max_timeout.as_secs();
    if seconds == 0 || seconds > max {
        let message = format!("{field}: {seconds} is not between 1 and {max}");
        return Err(ApiError::invalid(message));
    }
    Ok(Duration::from_secs(seconds))
}

/// Checks the number and the lengths of labels.
pub fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), ApiError> {
    if metadata.len() > MAX_METADATA_ENTRIES {
        let message = format!(
            "metadata: {} entries, at most {MAX_METADATA_ENTRIES} are kept",
            metadata.len()
        );
        return Err(ApiError::invalid(message));
    }
    for (key, value) in metadata {
        if key.is_empty() || key.chars().count() > MAX_METADATA_KEY {
            let message =
                format!("metadata: key {key:?} does not have 1 to {MAX_METADATA_KEY} characters");
            return Err(ApiError::invalid(message));
        }
        let length = value.chars().count();
        if length > MAX_METADATA_VALUE {
            let message = format!(
                "metadata.{key}: {length} characters, at most {MAX_METADATA_VALUE} are kept"
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

/// Make a sandbox: from the pool, or restored while the request waits
#[utoipa::path(post, path = "/sandboxes", tag = "sandboxes", operation_id = "create_sandbox",
    request_body = CreateBody,
    responses((status = 201, description = "The sandbox, with its token", body = SandboxView,
            headers(("Server-Timing" = String, description = "Phases and their milliseconds"),
                ("Location" = String, description = "Path of the sandbox"))),
        (status = 404, description = "`template_not_found`"),
        (status = 503, description = "`template_not_ready`, `restore_failed`, \
            `identity_not_proven`")))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    JsonBody(body): JsonBody<CreateBody>,
) -> Result<Response, ApiError> {
    let timeout = timeout(&app, body.timeout_seconds.unwrap_or(DEFAULT_TIMEOUT_SECONDS))?;
    let idle = body.idle_timeout_seconds;
    let idle_timeout = idle.map(|s| duration(&app, "idle_timeout_seconds", s)).transpose()?;
    check_metadata(&body.metadata)?;
    check_env(&body.env)?;
    let wanted = PolicyBody {
        internet: body.internet,
        network_limits: body.network_limits,
        public_ports: body.public_ports,
    };
    let request = CreateRequest {
        template: body.template,
        owner: caller.owner(),
        timeout,
        on_timeout: body.on_timeout,
        metadata: body.metadata,
        env: body.env,
        idle_timeout,
        made_by: idempotency::current(),
        network: wanted.on(&app, Policy::default())?,
    };
    let created = app.engine.create(request).await?;
    let view = SandboxView::new(&created.sandbox, Some(created.access_token));
    let location = HeaderValue::from_str(&format!("/v1/sandboxes/{}", view.id));
    let mut response = view.reply(StatusCode::CREATED);
    if let Ok(location) = location {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

/// Which sandboxes
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Sandboxes on a page; 100 when absent
    #[param(minimum = 1, maximum = 100)]
    limit: Option<usize>,
    /// The page before this one said it
    next_token: Option<String>,
    /// Only those of this template
    template: Option<String>,
    /// Only those with these labels: `metadata.KEY=VALUE`, once for each
    #[serde(flatten)]
    #[param(schema_with = filters_schema, style = Form, explode, required = false)]
    others: BTreeMap<String, String>,
}

/// A page of sandboxes
#[derive(Debug, Serialize, ToSchema)]
pub struct SandboxList {
    /// Newest first
    items: Vec<SandboxView>,
    /// To ask for the next page with; `null` on the last one
    next_token: Option<String>,
}

/// List sandboxes, newest first
#[utoipa::path(get, path = "/sandboxes", tag = "sandboxes", operation_id = "list_sandboxes",
    params(ListQuery),
    responses((status = 200, description = "A page of them", body = SandboxList)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Result<Query<ListQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<SandboxList>, ApiError> {
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
        let fits = caller.sees(&sandbox)
            && after.as_ref().is_none_or(|after| position > *after)
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
    Ok(Json(SandboxList { items, next_token }))
}

fn token_of(last: &SandboxView) -> String {
    token_at(last.created_at, &last.id)
}

/// The token of the page that begins after this sandbox.
pub fn token_at(created_at: OffsetDateTime, id: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{} {id}", created_at.unix_timestamp_nanos()))
}

/// The sandbox that a page begins after.
pub fn parse_token(token: &str) -> Result<(std::cmp::Reverse<i128>, String), ApiError> {
    let parse = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (at, id) = text.split_once(' ')?;
        Some((std::cmp::Reverse(at.parse().ok()?), id.to_owned()))
    };
    parse().ok_or_else(|| {
        ApiError::invalid("next_token: not one that this service gave; leave it out to start over")
    })
}

/// Show a sandbox
#[utoipa::path(get, path = "/sandboxes/{id}", tag = "sandboxes", operation_id = "get_sandbox",
    params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$")),
    responses((status = 200, description = "The sandbox", body = SandboxView),
        (status = 404, description = "`sandbox_not_found`")))]
pub async fn get(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Json<SandboxView>, ApiError> {
    Ok(Json(SandboxView::new(&*app.engine.sandbox(&id)?, None)))
}

/// Remove a sandbox and all it held
#[utoipa::path(delete, path = "/sandboxes/{id}", tag = "sandboxes",
    operation_id = "delete_sandbox", params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$")),
    responses((status = 204, description = "It is gone"),
        (status = 404, description = "`sandbox_not_found`")))]
pub async fn delete(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    app.engine.delete(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A life time
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Timeout)]
pub struct TimeoutBody {
    /// Counted from now
    #[schema(minimum = 1, maximum = 2_592_000)]
    timeout_seconds: u64,
}

/// Set the life time, counted from now
#[utoipa::path(post, path = "/sandboxes/{id}/timeout", tag = "sandboxes",
    operation_id = "set_timeout", params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$")),
    request_body = TimeoutBody,
    responses((status = 200, description = "The sandbox", body = SandboxView),
        (status = 404, description = "`sandbox_not_found`"),
        (status = 409, description = "`wrong_state`: it is paused")))]
pub async fn set_timeout(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<TimeoutBody>,
) -> Result<Json<SandboxView>, ApiError> {
    let timeout = timeout(&app, body.timeout_seconds)?;
    app.engine.set_timeout(&id, timeout).await?;
    Ok(Json(SandboxView::new(&*app.engine.sandbox(&id)?, None)))
}
