//! The control plane: sandboxes as E2B's API has them. One implementation behind the old paths and
//! the `/v2` ones.

mod body;
mod create;
mod list;
mod metrics;
mod snapshots;
mod transitions;
mod view;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{delete, get, post};

use crate::http::{App, MAX_JSON_BYTES};

/// The routes; whoever mounts them asks for the API key.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/sandboxes", get(list::running).post(create::create))
        .route("/v2/sandboxes", get(list::list).post(create::create))
        .route("/sandboxes/{id}", get(view::get).delete(transitions::kill))
        .route("/sandboxes/{id}/connect", post(transitions::connect))
        .route("/v2/sandboxes/{id}/connect", post(transitions::connect))
        .route("/sandboxes/{id}/resume", post(transitions::resume))
        .route("/sandboxes/{id}/pause", post(transitions::pause))
        .route("/sandboxes/{id}/timeout", post(transitions::set_timeout))
        .route("/sandboxes/{id}/refreshes", post(transitions::refresh))
        .route("/sandboxes/{id}/fork", post(transitions::fork))
        .route("/sandboxes/{id}/metrics", get(metrics::metrics))
        .route("/sandboxes/{id}/snapshots", post(snapshots::take))
        .route("/snapshots", get(snapshots::list))
        .route("/templates/{id}", delete(snapshots::delete))
        .layer(DefaultBodyLimit::max(MAX_JSON_BYTES))
}
