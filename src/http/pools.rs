//! `/v1/pools`: how many VMs wait, and how many should.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use super::App;
use super::error::ApiError;
use super::json::JsonBody;
use crate::engine::PoolNumbers;

/// More parked VMs than this are a typing error, not a plan.
const MAX_TARGET: u32 = 1000;

/// A pool as the API shows it.
#[derive(Debug, Serialize)]
pub struct PoolView {
    template: String,
    target: u32,
    ready: u32,
    restoring: u32,
    claimed: u32,
    misses_total: u64,
}

impl PoolView {
    fn new((template, numbers, claimed): (String, PoolNumbers, u32)) -> Self {
        let PoolNumbers { target, ready, restoring, misses_total } = numbers;
        Self { template, target, ready, restoring, claimed, misses_total }
    }
}

#[derive(Debug, Serialize)]
pub struct ListReply {
    items: Vec<PoolView>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolBody {
    target: u32,
}

/// `GET /v1/pools`
pub async fn list(State(app): State<App>) -> Json<ListReply> {
    let items = app.engine.pools().into_iter().map(PoolView::new).collect();
    Json(ListReply { items })
}

/// `GET /v1/pools/{template}`
pub async fn get(
    State(app): State<App>,
    Path(template): Path<String>,
) -> Result<Json<PoolView>, ApiError> {
    let found = app.engine.pools().into_iter().find(|p| p.0 == template);
    found.map(|p| Json(PoolView::new(p))).ok_or_else(|| pool_not_found(&template))
}

/// `PUT /v1/pools/{template}`
pub async fn set(
    State(app): State<App>,
    Path(template): Path<String>,
    JsonBody(body): JsonBody<PoolBody>,
) -> Result<Json<PoolView>, ApiError> {
    if body.target > MAX_TARGET {
        let message = format!("target: {} is above {MAX_TARGET}", body.target);
        return Err(ApiError::invalid(message));
    }
    let found = app.engine.set_pool_target(&template, body.target).await?;
    found.ok_or_else(|| pool_not_found(&template))?;
    get(State(app), Path(template)).await
}

fn pool_not_found(template: &str) -> ApiError {
    let message = format!("no pool for a template {template:?}; GET /v1/pools lists them");
    ApiError::new(StatusCode::NOT_FOUND, "pool_not_found", message)
}
