//! Snapshots: taken of a running sandbox, named as a template when the next one is made.

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::body::with_memory;
use crate::engine::SandboxSnapshot;
use crate::http::App;
use crate::http::error::{ApiError, ErrorCode};
use crate::http::json::JsonBody;
use crate::http::sandboxes::{PAGE_LIMIT, parse_token, token_at};

const MAX_NAME: usize = 64;

fn view(snapshot: &SandboxSnapshot) -> Value {
    json!({ "snapshotID": snapshot.id, "names": snapshot.name.iter().collect::<Vec<_>>() })
}

#[derive(Debug, Deserialize)]
pub struct TakeBody {
    name: Option<String>,
    memory: Option<bool>,
}

fn check_name(app: &App, name: &str) -> Result<(), ApiError> {
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b);
    if !(1..=MAX_NAME).contains(&name.len()) || !name.bytes().all(fits) {
        let message = format!("name: {name:?} is not 1 to {MAX_NAME} of a-z, 0-9, '-', '_', '.'");
        return Err(ApiError::invalid(message));
    }
    if app.engine.template(name).is_some() {
        return Err(ApiError::invalid(format!("name: {name:?} is a template's; choose another")));
    }
    Ok(())
}

/// `POST /sandboxes/{id}/snapshots`
pub async fn take(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<TakeBody>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    with_memory("memory", body.memory)?;
    if let Some(name) = &body.name {
        check_name(&app, name)?;
    }
    let snapshot = app.engine.take_snapshot(&id, body.name).await?;
    Ok((StatusCode::CREATED, Json(view(&snapshot))))
}

/// The parameters.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ListQuery {
    #[serde(rename = "sandboxID")]
    sandbox: Option<String>,
    name: Option<String>,
    limit: Option<usize>,
    next_token: Option<String>,
}

/// `GET /snapshots`: newest first, by page.
pub async fn list(
    State(app): State<App>,
    query: Result<Query<ListQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<(HeaderMap, Json<Vec<Value>>), ApiError> {
    let Query(query) = query.map_err(|e| ApiError::malformed(e.body_text()))?;
    let limit = query.limit.unwrap_or(PAGE_LIMIT);
    if limit == 0 || limit > PAGE_LIMIT {
        let message = format!("limit: {limit} is not between 1 and {PAGE_LIMIT}");
        return Err(ApiError::invalid(message));
    }
    let after = query.next_token.as_deref().map(parse_token).transpose()?;
    let mut all = app.engine.snapshots();
    all.retain(|s| {
        let at = std::cmp::Reverse(s.created_at.unix_timestamp_nanos());
        query.sandbox.as_ref().is_none_or(|id| *id == s.sandbox)
            && query.name.as_ref().is_none_or(|name| s.name.as_ref() == Some(name))
            && after.as_ref().is_none_or(|after| (at, s.id.clone()) > *after)
    });
    let mut headers = HeaderMap::new();
    if all.len() > limit
        && let Some(last) = all.get(limit - 1)
        && let Ok(token) = HeaderValue::try_from(token_at(last.created_at, &last.id))
    {
        headers.insert("x-next-token", token);
    }
    Ok((headers, Json(all.iter().take(limit).map(|s| view(s)).collect())))
}

/// `DELETE /templates/{id}`, as far as it is a snapshot: templates are the native API's.
pub async fn delete(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    if app.engine.delete_snapshot(&name).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    let message = format!("no snapshot {name:?}; templates are deleted at /v1/templates");
    Err(ApiError::new(StatusCode::NOT_FOUND, ErrorCode::TEMPLATE_NOT_FOUND, message))
}
