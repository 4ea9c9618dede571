//! `/v1/pools`: how many VMs wait, and how many should.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::App;
use super::error::{ApiError, ErrorCode};
use super::json::JsonBody;
use crate::engine::PoolNumbers;

/// A pool
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Pool)]
pub struct PoolView {
    /// Template of its VMs
    template: String,
    /// VMs that should wait
    target: u32,
    /// VMs that wait
    ready: u32,
    /// VMs on their way; those with a proven identity can be claimed before they wait
    restoring: u32,
    /// Sandboxes of this template that are not paused
    claimed: u32,
    /// Claims that found the pool empty, since the service started
    misses_total: u64,
}

impl PoolView {
    /// The view of a pool.
    pub fn new((template, numbers, claimed): (String, PoolNumbers, u32)) -> Self {
        let PoolNumbers { target, ready, restoring, misses_total } = numbers;
        Self { template, target, ready, restoring, claimed, misses_total }
    }
}

/// Every pool
#[derive(Debug, Serialize, ToSchema)]
pub struct PoolList {
    /// By template
    items: Vec<PoolView>,
}

/// How many VMs should wait
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PoolTarget)]
pub struct PoolBody {
    /// Parked VMs to keep
    #[schema(maximum = 1000)]
    target: u32,
}

/// List pools
#[utoipa::path(get, path = "/pools", tag = "pools", operation_id = "list_pools",
    responses((status = 200, description = "Every pool", body = PoolList)))]
pub async fn list(State(app): State<App>) -> Json<PoolList> {
    let items = app.engine.pools().into_iter().map(PoolView::new).collect();
    Json(PoolList { items })
}

/// Show a pool
#[utoipa::path(get, path = "/pools/{template}", tag = "pools", operation_id = "get_pool",
    params(("template" = String, Path, description = "Its template")),
    responses((status = 200, description = "The pool", body = PoolView),
        (status = 404, description = "`pool_not_found`")))]
pub async fn get(
    State(app): State<App>,
    Path(template): Path<String>,
) -> Result<Json<PoolView>, ApiError> {
    let found = app.engine.pools().into_iter().find(|p| p.0 == template);
    found.map(|p| Json(PoolView::new(p))).ok_or_else(|| pool_not_found(&template))
}

/// Set how many VMs of a template should wait
#[utoipa::path(put, path = "/pools/{template}", tag = "pools", operation_id = "set_pool",
    params(("template" = String, Path, description = "Its template")),
    request_body = PoolBody,
    responses((status = 200, description = "The pool", body = PoolView),
        (status = 404, description = "`pool_not_found`")))]
pub async fn set(
    State(app): State<App>,
    Path(template): Path<String>,
    JsonBody(body): JsonBody<PoolBody>,
) -> Result<Json<PoolView>, ApiError> {
    let max = app.engine.config().max_pool_target;
    if body.target > max {
        let message = format!("target: {} is above {max}", body.target);
        return Err(ApiError::invalid(message));
    }
    let found = app.engine.set_pool_target(&template, body.target).await?;
    found.ok_or_else(|| pool_not_found(&template))?;
    get(State(app), Path(template)).await
}

fn pool_not_found(template: &str) -> ApiError {
    let message = format!("no pool for a template {template:?}; GET /v1/pools lists them");
    ApiError::new(StatusCode::NOT_FOUND, ErrorCode::POOL_NOT_FOUND, message)
}
