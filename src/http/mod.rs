//! The HTTP face: native API under `/v1`, operations at the root.
//!
//! ```text
//! / /dashboard/*                       ../dashboard no key needed
//! /healthz /readyz /metrics            ops.rs       no key needed
//! /v1/openapi.json                     openapi.rs   no key needed
//! /v1/info                             ops.rs
//! /v1/stats                            stats.rs
//! /v1/events                           events.rs    server-sent
//! /v1/sandboxes[/{id}[/timeout]]       sandboxes.rs
//! /v1/sandboxes/{id}/{pause,resume,fork}  transitions.rs
//! /v1/sandboxes/{id}/exec              exec.rs
//! /v1/sandboxes/{id}/files             files.rs
//! /v1/templates[/{name}]               templates.rs
//! /v1/pools[/{template}]               pools.rs
//! ```
//!
//! Engine errors become status codes here and nowhere else: see [`error`]. How a route gets into
//! the OpenAPI document: see [`openapi`].

mod auth;
mod error;
mod events;
mod exec;
mod files;
#[allow(dead_code, reason = "its users come with the port proxy")]
mod host;
mod json;
mod openapi;
mod ops;
mod pools;
mod request_id;
mod sandboxes;
mod stats;
mod templates;
mod transitions;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;

pub use auth::ApiKey;
pub use error::ApiError;

use crate::engine::Engine;
use crate::live::History;

/// Longest JSON body; files are streamed and not bound by it.
pub const MAX_JSON_BYTES: usize = 1 << 20;

/// What every handler can reach.
#[derive(Debug, Clone)]
pub struct App {
    /// The engine.
    pub engine: Arc<Engine>,
    /// The API key, or `None` when the operator switched keys off.
    pub key: Option<ApiKey>,
    /// Renders `/metrics`.
    pub metrics: PrometheusHandle,
    /// The last minutes.
    pub history: Arc<History>,
    /// Cancelled when the service stops: streams without an end of their own end then.
    pub closing: CancellationToken,
}

/// All routes, ready to be served.
pub fn router(app: App) -> Router {
    let key = axum::middleware::from_fn_with_state(app.clone(), auth::require_key);
    let (router, _) = routes(|v1| v1.layer(key)).split_for_parts();
    router
        .merge(crate::dashboard::routes())
        .fallback(|| async { ApiError::route_not_found() })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(axum::middleware::from_fn(request_id::track))
        .with_state(app)
}

/// Every route, with its documentation; `guard` is laid around those that need a key.
fn routes(guard: impl FnOnce(OpenApiRouter<App>) -> OpenApiRouter<App>) -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(openapi::Head::openapi())
        .routes(routes!(ops::healthz))
        .routes(routes!(ops::readyz))
        .routes(routes!(ops::metrics))
        .routes(routes!(openapi::openapi))
        .nest("/v1", guard(v1()))
}

fn v1() -> OpenApiRouter<App> {
    OpenApiRouter::default()
        .routes(routes!(ops::info))
        .routes(routes!(stats::get))
        .routes(routes!(events::stream))
        .routes(routes!(sandboxes::list, sandboxes::create))
        .routes(routes!(sandboxes::get, sandboxes::delete))
        .routes(routes!(sandboxes::set_timeout))
        .routes(routes!(transitions::pause))
        .routes(routes!(transitions::resume))
        .routes(routes!(transitions::fork))
        .routes(routes!(exec::exec))
        .routes(routes!(templates::list))
        .routes(routes!(templates::get))
        .routes(routes!(pools::list))
        .routes(routes!(pools::get, pools::set))
        .layer(DefaultBodyLimit::max(MAX_JSON_BYTES))
        // Streamed: no limit but the guest's disk.
        .routes(routes!(files::get, files::put, files::delete).layer(DefaultBodyLimit::disable()))
}
