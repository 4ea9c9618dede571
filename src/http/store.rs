//! `/v1/inputs`, `/v1/store`, `/v1/gc`: what builds copy, what everything takes on disk, and what of
//! it nobody needs.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::App;
use super::error::{ApiError, ErrorCode};
use super::json::JsonBody;
use crate::engine::build::is_sha256;
use crate::engine::gc::Garbage;

/// What just came may be about to be used.
const DEFAULT_AGE_SECONDS: u32 = 3600;

fn check_digest(sha256: &str) -> Result<(), ApiError> {
    if is_sha256(sha256) {
        return Ok(());
    }
    let message = format!("{sha256:?} is not a SHA-256: 64 hexadecimal digits in lower case");
    Err(ApiError::invalid(message))
}

/// An input that is there
#[derive(Debug, Serialize, ToSchema)]
pub struct Input {
    /// SHA-256 of its bytes
    sha256: String,
}

/// Upload a tar archive for `copy` steps; it is kept by its digest
#[utoipa::path(put, path = "/inputs/{sha256}", tag = "templates", operation_id = "put_input",
    params(("sha256" = String, Path, description = "SHA-256 of the archive",
        pattern = "^[0-9a-f]{64}$")),
    request_body(content((Vec<u8> = "application/x-tar"))),
    responses((status = 200, description = "It was there", body = Input),
        (status = 201, description = "It is kept", body = Input),
        (status = 422, description = "`invalid_field`: no digest, or another archive's"),
        (status = 500, description = "`input_not_kept`"),
        (status = 507, description = "`disk_budget_exceeded`")))]
pub async fn put_input(
    State(app): State<App>,
    Path(sha256): Path<String>,
    body: Body,
) -> Result<Response, ApiError> {
    check_digest(&sha256)?;
    let inputs = app.engine.inputs();
    if inputs.has(&sha256) {
        return Ok((StatusCode::OK, Json(Input { sha256 })).into_response());
    }
    inputs.receive(&sha256, app.engine.room(), body.into_data_stream()).await?;
    Ok((StatusCode::CREATED, Json(Input { sha256 })).into_response())
}

/// Ask whether an archive is there
#[utoipa::path(get, path = "/inputs/{sha256}", tag = "templates", operation_id = "get_input",
    params(("sha256" = String, Path, description = "SHA-256 of the archive",
        pattern = "^[0-9a-f]{64}$")),
    responses((status = 200, description = "It is there", body = Input),
        (status = 404, description = "`input_not_found`")))]
pub async fn get_input(
    State(app): State<App>,
    Path(sha256): Path<String>,
) -> Result<Json<Input>, ApiError> {
    check_digest(&sha256)?;
    if app.engine.inputs().has(&sha256) {
        return Ok(Json(Input { sha256 }));
    }
    Err(ApiError::new(
        StatusCode::NOT_FOUND,
        ErrorCode::INPUT_NOT_FOUND,
        format!("no input {sha256}"),
    ))
}

/// Bytes on disk, files with several names counted once
#[derive(Debug, Serialize, ToSchema)]
pub struct StoreUsage {
    /// Snapshots and uploads
    used_bytes: u64,
    /// Snapshots of templates and paused sandboxes
    snapshots_bytes: u64,
    /// Uploaded archives
    inputs_bytes: u64,
    /// What may be used; `null` without a limit
    budget_bytes: Option<u64>,
}

/// Show what the store takes on disk
#[utoipa::path(get, path = "/store", tag = "templates", operation_id = "get_store",
    responses((status = 200, description = "Bytes by kind, and the budget", body = StoreUsage)))]
pub async fn usage(State(app): State<App>) -> Json<StoreUsage> {
    let usage = app.engine.usage();
    Json(StoreUsage {
        used_bytes: usage.total_bytes(),
        snapshots_bytes: usage.snapshots_bytes,
        inputs_bytes: usage.inputs_bytes,
        budget_bytes: app.engine.config().disk_budget_bytes,
    })
}

/// What to collect
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Collect)]
pub struct GcBody {
    /// Only say what would be removed
    #[serde(default)]
    dry_run: bool,
    /// Leave what is younger; an hour when not given
    #[schema(maximum = 4_294_967_295_u32)]
    older_than_seconds: Option<u32>,
}

/// What was collected
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Collected)]
pub struct GcReply {
    /// Nothing was removed
    dry_run: bool,
    /// What nothing refers to
    items: Vec<Garbage>,
    /// Bytes that go with it
    bytes: u64,
}

/// Remove what nothing refers to, or say what that would be
#[utoipa::path(post, path = "/gc", tag = "templates", operation_id = "collect_garbage",
    request_body = Option<GcBody>,
    responses((status = 200, description = "What was found", body = GcReply),
        (status = 500, description = "`gc_failed`"),
        (status = 503, description = "`template_not_ready`: what is needed is not known yet")))]
pub async fn collect(
    State(app): State<App>,
    JsonBody(body): JsonBody<GcBody>,
) -> Result<Json<GcReply>, ApiError> {
    let age = Duration::from_secs(body.older_than_seconds.unwrap_or(DEFAULT_AGE_SECONDS).into());
    let items = app.engine.collect_garbage(body.dry_run, age).await?;
    let bytes = items.iter().map(|garbage| garbage.bytes).sum();
    Ok(Json(GcReply { dry_run: body.dry_run, items, bytes }))
}
