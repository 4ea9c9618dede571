//! Health, readiness, metrics, and what this service is.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::Serialize;
use snapshotter::vmm::VmmKind;
use utoipa::ToSchema;

use super::{App, MAX_JSON_BYTES, events};
use crate::engine::template::{BASE, TemplateState};

/// The process serves
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// Always `ok`
    status: &'static str,
}

/// What can be used already
#[derive(Debug, Serialize, ToSchema)]
pub struct Readiness {
    /// `ready`, `starting` or `failed`
    status: &'static str,
    /// One for each template and each pool
    checks: BTreeMap<String, Check>,
}

/// One finding
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
enum Check {
    /// A template
    Template {
        /// It can be claimed
        ok: bool,
        /// How far it is
        state: TemplateState,
        /// What is being done, or why it failed
        detail: String,
    },
    /// A pool
    Pool {
        /// VMs that wait
        ready: u32,
        /// VMs that should
        target: u32,
    },
}

/// What this service is
#[derive(Debug, Serialize, ToSchema)]
pub struct Info {
    /// `rethaw`
    name: &'static str,
    /// Its version
    version: &'static str,
    /// Since its start
    uptime_seconds: u64,
    /// VMM that runs new sandboxes
    #[schema(value_type = String)]
    vmm: VmmKind,
    /// What snapshots made here depend on
    host: BTreeMap<String, String>,
    /// What it does not do more than
    limits: Limits,
}

/// Limits of every request
#[derive(Debug, Serialize, ToSchema)]
struct Limits {
    /// Longest JSON body
    json_body_bytes: usize,
    /// Longest life time a sandbox may ask for
    timeout_seconds: u64,
}

/// Whether the process serves
#[utoipa::path(get, path = "/healthz", tag = "service", operation_id = "get_health",
    responses((status = 200, description = "It does", body = Health)))]
pub async fn healthz() -> Json<Health> {
    Json(Health { status: "ok" })
}

// Templates that users derive come, fail and go while the service is ready.
/// Whether `base` can be claimed
#[utoipa::path(get, path = "/readyz", tag = "service", operation_id = "get_readiness",
    responses((status = 200, description = "It can", body = Readiness),
        (status = 503, description = "Not yet, or never, and why", body = Readiness)))]
pub async fn readyz(State(app): State<App>) -> impl IntoResponse {
    let mut checks = BTreeMap::new();
    let mut ready = false;
    let mut status = "ready";
    if let Some(template) = app.engine.template(BASE) {
        let now = template.status();
        let ok = now.state == TemplateState::Ready;
        if now.state == TemplateState::Failed {
            status = "failed";
        } else if !ok {
            status = "starting";
        }
        ready = ok;
        let detail = now.error.unwrap_or(now.message);
        let check = Check::Template { ok, state: now.state, detail };
        checks.insert(format!("template:{}", template.name), check);
    }
    for (name, numbers, _) in app.engine.pools() {
        let check = Check::Pool { ready: numbers.ready, target: numbers.target };
        checks.insert(format!("pool:{name}"), check);
    }
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(Readiness { status, checks }))
}

/// Metrics
#[utoipa::path(get, path = "/metrics", tag = "service", operation_id = "get_metrics",
    responses((status = 200, description = "Prometheus text", body = String)))]
pub async fn metrics(State(app): State<App>) -> impl IntoResponse {
    crate::metrics::sample(&app.engine, events::viewers());
    let mut text = app.metrics.render();
    text.push_str(&crate::metrics::fault_histogram(&app.engine));
    text.push_str(&crate::metrics::process_text());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

/// Version, VMM and limits of the service
#[utoipa::path(get, path = "/info", tag = "service", operation_id = "get_info",
    responses((status = 200, description = "What it is", body = Info)))]
pub async fn info(State(app): State<App>) -> Json<Info> {
    let driver = app.engine.driver();
    Json(Info {
        name: "rethaw",
        version: env!("CARGO_PKG_VERSION"),
        uptime_seconds: app.engine.uptime().as_secs(),
        vmm: driver.kind(),
        host: driver.compat().facts.clone(),
        limits: Limits {
            json_body_bytes: MAX_JSON_BYTES,
            timeout_seconds: app.engine.config().max_timeout.as_secs(),
        },
    })
}
