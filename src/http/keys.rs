//! `/v1/keys`: API keys besides that of the key file; for keys with the scope `admin`.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::App;
use super::error::ApiError;
use super::json::JsonBody;
use crate::engine::keys::{Key, Quotas, Scope};

const MAX_NAME: usize = 64;

/// An API key
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Key)]
pub struct KeyView {
    /// Its id
    #[schema(pattern = "^[a-z0-9]{20}$")]
    id: String,
    /// What people call it
    name: String,
    /// What it may do
    scopes: BTreeSet<Scope>,
    /// How much it may have
    quotas: Quotas,
    /// When it was made
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// The key itself: shown when it is made, and never again
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    key: Option<String>,
}

impl KeyView {
    fn new(key: Key, secret: Option<String>) -> Self {
        let Key { id, name, scopes, quotas, created_at } = key;
        Self { id, name, scopes, quotas, created_at, key: secret }
    }
}

/// Every key but that of the key file
#[derive(Debug, Serialize, ToSchema)]
pub struct KeyList {
    /// By age
    items: Vec<KeyView>,
    /// Always `null`: all of them are on this page
    next_token: Option<String>,
}

/// A key to make
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = CreateKey)]
pub struct KeyBody {
    /// What to call it
    #[schema(pattern = "^[A-Za-z0-9._-]{1,64}$")]
    name: String,
    /// What it may do; `["sandboxes"]` when absent
    #[schema(min_items = 1)]
    scopes: Option<BTreeSet<Scope>>,
    /// How much it may have
    #[serde(default)]
    #[schema(required = false)]
    quotas: Quotas,
}

fn check(body: &KeyBody) -> Result<(), ApiError> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if !(1..=MAX_NAME).contains(&body.name.len()) || !body.name.bytes().all(fits) {
        let message = format!("name: needs 1 to {MAX_NAME} of A-Z, a-z, 0-9, '.', '_' and '-'");
        return Err(ApiError::invalid(message));
    }
    if body.scopes.as_ref().is_some_and(BTreeSet::is_empty) {
        return Err(ApiError::invalid("scopes: needs at least one; leave it out for sandboxes"));
    }
    if let Some(rate) = body.quotas.claims_per_second
        && !(rate > 0.0 && rate <= 1e6)
    {
        let message = format!("quotas.claims_per_second: {rate} is not above 0 and up to 1000000");
        return Err(ApiError::invalid(message));
    }
    Ok(())
}

/// List API keys
#[utoipa::path(get, path = "/keys", tag = "keys", operation_id = "list_keys",
    responses((status = 200, description = "Every key but that of the key file", body = KeyList)))]
pub async fn list(State(app): State<App>) -> Json<KeyList> {
    let items = app.engine.keys().list().into_iter().map(|key| KeyView::new(key, None)).collect();
    Json(KeyList { items, next_token: None })
}

/// Make an API key
#[utoipa::path(post, path = "/keys", tag = "keys", operation_id = "create_key",
    request_body = KeyBody,
    responses((status = 201, description = "The key, with its secret", body = KeyView),
        (status = 409, description = "`name_taken`")))]
pub async fn create(
    State(app): State<App>,
    JsonBody(body): JsonBody<KeyBody>,
) -> Result<(StatusCode, Json<KeyView>), ApiError> {
    check(&body)?;
    let scopes = body.scopes.unwrap_or_else(|| BTreeSet::from([Scope::Sandboxes]));
    let (key, secret) = app.engine.keys().create(body.name, scopes, body.quotas).await?;
    Ok((StatusCode::CREATED, Json(KeyView::new(key, Some(secret)))))
}

/// Remove an API key; its sandboxes stay
#[utoipa::path(delete, path = "/keys/{id}", tag = "keys", operation_id = "delete_key",
    params(("id" = String, Path, description = "A key", pattern = "^[a-z0-9]{20}$")),
    responses((status = 204, description = "It opens nothing any more"),
        (status = 404, description = "`key_not_found`")))]
pub async fn delete(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    app.engine.keys().remove(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
