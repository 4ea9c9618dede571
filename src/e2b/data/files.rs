//! `/files`: contents of files, down and up.

use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequestParts, Query, Request, State};
use axum::http::header;
use axum::http::request::Parts;
use axum::response::Response;
use serde::Deserialize;
use serde_json::Value;

use super::guest::{Guest, Refusal, running, sandbox_id};
use super::path::{encode, resolve};
use super::signature::{Operation, fits};
use super::upload;
use crate::e2b::DEFAULT_USER;
use crate::http::App;
use crate::http::error::{ApiError, ErrorCode};
use crate::http::files::forward;

/// Parameters of `/files`.
#[derive(Debug, Default, Deserialize)]
pub struct FilesQuery {
    /// The file.
    pub path: Option<String>,
    /// User whose home relative paths start at, and who owns what is made.
    pub username: Option<String>,
    /// What a signed URL shows instead of a token.
    pub signature: Option<String>,
    /// Until when it may, in seconds since 1970.
    pub signature_expiration: Option<i64>,
}

impl FilesQuery {
    /// The user that is meant.
    pub fn user(&self) -> &str {
        self.username.as_deref().filter(|name| !name.is_empty()).unwrap_or(DEFAULT_USER)
    }
}

/// The sandbox whose token or signature the request shows. A signed URL names no sandbox when the
/// SDK has an address that all of them share; then its signature does.
async fn open(
    app: &App,
    parts: &mut Parts,
    query: &FilesQuery,
    operation: Operation,
) -> Result<Guest, Refusal> {
    let signed = |sandbox: &Arc<_>| {
        app.engine.access_token(sandbox).is_some_and(|token| fits(query, operation, &token))
    };
    match (sandbox_id(parts), &query.signature) {
        (Some(id), Some(_)) => {
            let guest = running(app, id)?;
            if signed(&guest.sandbox) { Ok(guest) } else { Err(wrong_signature()) }
        }
        (None, Some(_)) => {
            let named = app.engine.sandboxes().into_iter().find(signed);
            running(app, &named.ok_or_else(wrong_signature)?.data().id)
        }
        (_, None) => Guest::from_request_parts(parts, app).await,
    }
}

fn wrong_signature() -> Refusal {
    let message = "the URL's signature does not fit, or its time is up";
    ApiError::new(axum::http::StatusCode::UNAUTHORIZED, ErrorCode::UNAUTHORIZED, message).into()
}

fn query_of(parts: &Parts) -> Result<FilesQuery, ApiError> {
    let query = Query::try_from_uri(&parts.uri);
    query.map(|Query(query)| query).map_err(|e| ApiError::malformed(e.body_text()))
}

/// `GET /files?path=`
pub async fn download(State(app): State<App>, request: Request) -> Result<Response, Refusal> {
    let (mut parts, body) = request.into_parts();
    let query = query_of(&parts)?;
    let guest = open(&app, &mut parts, &query, Operation::Read).await?;
    let path = query.path.as_deref().unwrap_or_default();
    let path = resolve(&guest.agent, path, query.user()).await?;
    let uri = format!("/files?path={}", encode(&path));
    // A folder is no file here, whatever the client says it would take.
    parts.headers.remove(header::ACCEPT);
    Ok(forward(&guest.agent, Request::from_parts(parts, body), &uri).await?)
}

/// `POST /files?path=`: one file as it is, or a form of several.
pub async fn upload(State(app): State<App>, request: Request) -> Result<Json<Value>, Refusal> {
    let (mut parts, body) = request.into_parts();
    let query = query_of(&parts)?;
    let guest = open(&app, &mut parts, &query, Operation::Write).await?;
    let written = upload::take(&guest.agent, &query, Request::from_parts(parts, body)).await?;
    Ok(Json(Value::Array(written)))
}
