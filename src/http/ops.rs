//! Health, readiness, metrics, and what this service is.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde_json::{Value, json};

use super::{App, MAX_JSON_BYTES};
use crate::engine::template::TemplateState;

/// `GET /healthz`: the process serves.
pub async fn healthz() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /readyz`: 200 once every template that was promised can be claimed, with a reason for each
/// that cannot.
pub async fn readyz(State(app): State<App>) -> impl IntoResponse {
    let mut checks = serde_json::Map::new();
    let mut ready = true;
    let mut status = "ready";
    for template in app.engine.templates() {
        let now = template.status();
        let ok = now.state == TemplateState::Ready;
        if now.state == TemplateState::Failed {
            status = "failed";
        } else if !ok && status == "ready" {
            status = "starting";
        }
        ready &= ok;
        let detail = now.error.unwrap_or(now.message);
        let check = json!({"ok": ok, "state": now.state, "detail": detail});
        checks.insert(format!("template:{}", template.name), check);
    }
    for (name, numbers, _) in app.engine.pools() {
        let check = json!({"ready": numbers.ready, "target": numbers.target});
        checks.insert(format!("pool:{name}"), check);
    }
    if app.engine.templates().is_empty() {
        (ready, status) = (false, "starting");
    }
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({"status": status, "checks": checks})))
}

/// `GET /metrics`: Prometheus text.
pub async fn metrics(State(app): State<App>) -> impl IntoResponse {
    crate::metrics::sample(&app.engine);
    let mut text = app.metrics.render();
    text.push_str(&crate::metrics::fault_histogram(&app.engine));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

/// `GET /v1/info`
pub async fn info(State(app): State<App>) -> Json<Value> {
    let driver = app.engine.driver();
    Json(json!({
        "name": "rethaw",
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": app.engine.uptime().as_secs(),
        "vmm": driver.kind(),
        "host": driver.compat().facts,
        "limits": {
            "json_body_bytes": MAX_JSON_BYTES,
            "timeout_seconds": app.engine.config().max_timeout.as_secs(),
        },
    }))
}
