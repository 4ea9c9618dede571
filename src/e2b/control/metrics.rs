//! `GET /sandboxes/{id}/metrics`: what the sandbox uses, looked at when it is asked for. Nothing is
//! sampled in between, so there is one sample at most.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use guest_agent::wire::Usage;
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::http::App;
use crate::http::error::ApiError;

/// How long the guest may take to look.
const DEADLINE: Duration = Duration::from_secs(10);

/// The parameters: seconds since 1970.
#[derive(Debug, Deserialize)]
pub struct MetricsQuery {
    start: Option<i64>,
    end: Option<i64>,
}

/// The handler. A paused sandbox uses nothing.
pub async fn metrics(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Result<Query<MetricsQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Vec<Value>>, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::malformed(e.body_text()))?;
    let sandbox = app.engine.sandbox(&id)?;
    let Some(agent) = sandbox.agent() else { return Ok(Json(Vec::new())) };
    let usage: Usage = agent.call(Method::GET, "/usage", None::<&()>, DEADLINE).await?;
    let now = OffsetDateTime::now_utc();
    let seconds = now.unix_timestamp();
    let outside = query.start.is_some_and(|start| seconds < start)
        || query.end.is_some_and(|end| seconds > end);
    if outside {
        return Ok(Json(Vec::new()));
    }
    Ok(Json(vec![json!({
        "timestamp": now.format(&Rfc3339).unwrap_or_default(),
        "timestampUnix": seconds,
        "cpuCount": usage.cpu_count,
        "cpuUsedPct": usage.cpu_used_percent,
        "memUsed": usage.memory_used_bytes,
        "memTotal": usage.memory_bytes,
        "memCache": usage.memory_cache_bytes,
        "diskUsed": usage.disk_used_bytes,
        "diskTotal": usage.disk_bytes,
    })]))
}
