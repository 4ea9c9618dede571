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
//! /v1/sandboxes/{id}/pty               pty.rs       WebSocket
//! /v1/sandboxes/{id}/files             files.rs
//! /v1/sandboxes/{id}/network           network.rs
//! /v1/sandboxes/{id}/ports/{port}/...  ports.rs     the sandbox's token does, too
//! {port}-{id}.{domain}                 ports.rs     likewise
//! /v1/templates[/{name}[/log]]         templates.rs
//! /v1/{inputs/{sha256},store,gc}       store.rs
//! /v1/pools[/{template}]               pools.rs
//! /v1/keys[/{id}]                      keys.rs
//! /sandboxes /v2/... /process.Process/... /files ...   what E2B's SDKs ask for: crate::e2b
//! ```
//!
//! What a route asks of the key that comes with a request: see [`access`].
//!
//! Every POST but exec takes an `Idempotency-Key`: see [`idempotency`].
//!
//! Engine errors become status codes here and nowhere else: see [`error`]. How a route gets into
//! the OpenAPI document: see [`openapi`].

mod access;
pub mod auth;
pub mod error;
mod error_code;
mod events;
mod exec;
pub mod files;
pub mod host;
pub mod idempotency;
pub mod json;
mod keys;
mod network;
mod openapi;
mod ops;
mod pools;
mod ports;
mod pty;
mod request_id;
pub mod sandboxes;
mod stats;
mod store;
mod templates;
pub mod transitions;
mod unread;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::any;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;

pub use auth::{KEY_PREFIX, key_from_file};
pub use error::ApiError;

use crate::audit::Audit;
use crate::e2b;
use crate::engine::Engine;
use crate::engine::keys::Account;
use crate::live::History;

/// Longest JSON body; files are streamed and not bound by it.
pub const MAX_JSON_BYTES: usize = 1 << 20;

/// What every handler can reach.
#[derive(Debug, Clone)]
pub struct App {
    /// The engine.
    pub engine: Arc<Engine>,
    /// Who everybody is taken for, when the operator switched keys off.
    pub everybody: Option<Arc<Account>>,
    /// Who changed what.
    pub audit: Audit,
    /// Renders `/metrics`.
    pub metrics: PrometheusHandle,
    /// Domain of the host names of ports; any where there is none.
    pub domain: Option<Arc<str>>,
    /// The last minutes.
    pub history: Arc<History>,
    /// Cancelled when the service stops: streams without an end of their own end then.
    pub closing: CancellationToken,
}

/// All routes, ready to be served.
pub fn router(app: App) -> Router {
    let key = axum::middleware::from_fn_with_state(app.clone(), auth::require_key);
    let once = axum::middleware::from_fn_with_state(app.clone(), idempotency::once);
    let track = axum::middleware::from_fn_with_state(app.audit.clone(), request_id::track);
    let (router, _) = routes(|v1| v1.layer(once.clone()).layer(key.clone())).split_for_parts();
    router
        .merge(e2b::control_routes().layer(once).layer(key))
        .merge(e2b::data_routes())
        .merge(ports())
        .merge(crate::dashboard::routes())
        .fallback(|| async { ApiError::route_not_found() })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(axum::middleware::from_fn_with_state(app.clone(), ports::by_host))
        .layer(axum::middleware::from_fn_with_state(app.clone(), e2b::by_host))
        .layer(axum::middleware::from_fn(unread::settle))
        .layer(track)
        .with_state(app)
}

/// Ports of sandboxes: what passes there is the guests' business, in body and in documentation.
fn ports() -> Router<App> {
    Router::new()
        .route("/v1/sandboxes/{id}/ports/{port}", any(ports::by_path))
        .route("/v1/sandboxes/{id}/ports/{port}/", any(ports::by_path))
        .route("/v1/sandboxes/{id}/ports/{port}/{*rest}", any(ports::by_path))
        .layer(DefaultBodyLimit::disable())
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
        .routes(routes!(network::get, network::change))
        .routes(routes!(exec::exec))
        .routes(routes!(pty::pty))
        .routes(routes!(templates::list, templates::build))
        .routes(routes!(templates::get, templates::delete))
        .routes(routes!(templates::log))
        .routes(routes!(store::usage))
        .routes(routes!(store::collect))
        .routes(routes!(pools::list))
        .routes(routes!(pools::get, pools::set))
        .routes(routes!(keys::list, keys::create))
        .routes(routes!(keys::delete))
        .layer(DefaultBodyLimit::max(MAX_JSON_BYTES))
        // Streamed: no limit but the disk.
        .routes(routes!(store::get_input, store::put_input).layer(DefaultBodyLimit::disable()))
        .routes(routes!(files::get, files::put, files::delete).layer(DefaultBodyLimit::disable()))
}
