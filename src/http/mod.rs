//! The HTTP face: native API under `/v1`, operations at the root.
//!
//! ```text
//! /healthz /readyz /metrics            ops.rs       no key needed
//! /v1/info                             ops.rs
//! /v1/sandboxes[/{id}[/timeout]]       sandboxes.rs
//! /v1/sandboxes/{id}/{pause,resume,fork}  transitions.rs
//! /v1/sandboxes/{id}/exec              exec.rs
//! /v1/sandboxes/{id}/files             files.rs
//! /v1/templates[/{name}]               templates.rs
//! /v1/pools[/{template}]               pools.rs
//! ```
//!
//! Engine errors become status codes here and nowhere else: see [`error`].

mod auth;
mod error;
mod exec;
mod files;
#[allow(dead_code, reason = "its users come with the port proxy")]
mod host;
mod json;
mod ops;
mod pools;
mod request_id;
mod sandboxes;
mod templates;
mod transitions;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{any, get, post};
use metrics_exporter_prometheus::PrometheusHandle;

pub use auth::ApiKey;
use error::ApiError;

use crate::engine::Engine;

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
}

/// All routes.
pub fn router(app: App) -> Router {
    let v1 = Router::new()
        .route("/info", get(ops::info))
        .route("/sandboxes", get(sandboxes::list).post(sandboxes::create))
        .route("/sandboxes/{id}", get(sandboxes::get).delete(sandboxes::delete))
        .route("/sandboxes/{id}/timeout", post(sandboxes::set_timeout))
        .route("/sandboxes/{id}/pause", post(transitions::pause))
        .route("/sandboxes/{id}/resume", post(transitions::resume))
        .route("/sandboxes/{id}/fork", post(transitions::fork))
        .route("/sandboxes/{id}/exec", post(exec::exec))
        .route("/templates", get(templates::list))
        .route("/templates/{name}", get(templates::get))
        .route("/pools", get(pools::list))
        .route("/pools/{template}", get(pools::get).put(pools::set))
        .layer(DefaultBodyLimit::max(MAX_JSON_BYTES))
        // Streamed: no limit but the guest's disk.
        .route("/sandboxes/{id}/files", any(files::files).layer(DefaultBodyLimit::disable()))
        .layer(axum::middleware::from_fn_with_state(app.clone(), auth::require_key));
    Router::new()
        .route("/healthz", get(ops::healthz))
        .route("/readyz", get(ops::readyz))
        .route("/metrics", get(ops::metrics))
        .nest("/v1", v1)
        .fallback(|| async { ApiError::route_not_found() })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(axum::middleware::from_fn(request_id::track))
        .with_state(app)
}
