//! `GET /v2/sandboxes`: by page, the next one's token in a header; `GET /sandboxes`: what runs.

use std::cmp::Reverse;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderValue};
use serde::Deserialize;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::view::{listed, state};
use crate::engine::sandbox::{Sandbox, SandboxData};
use crate::http::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::sandboxes::{PAGE_LIMIT, parse_token, token_at};

/// The parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ListQuery {
    metadata: Option<String>,
    state: Option<String>,
    started_after: Option<String>,
    template: Option<String>,
    order: Option<String>,
    limit: Option<usize>,
    next_token: Option<String>,
}

/// The parameters, understood.
#[derive(Debug)]
struct Filter {
    metadata: Vec<(String, String)>,
    states: Vec<String>,
    started_after: Option<OffsetDateTime>,
    template: Option<String>,
}

impl Filter {
    fn new(query: &ListQuery) -> Result<Self, ApiError> {
        let states: Vec<String> =
            query.state.iter().flat_map(|s| s.split(',')).map(str::to_owned).collect();
        if let Some(state) = states.iter().find(|s| !matches!(s.as_str(), "running" | "paused")) {
            let message = format!("state: {state:?} is neither \"running\" nor \"paused\"");
            return Err(ApiError::invalid(message));
        }
        let started_after = query.started_after.as_ref().map(|text| {
            OffsetDateTime::parse(text, &Rfc3339)
                .map_err(|e| ApiError::invalid(format!("startedAfter: {text:?}: {e}")))
        });
        Ok(Self {
            metadata: query.metadata.as_deref().map(metadata).unwrap_or_default(),
            states,
            started_after: started_after.transpose()?,
            template: query.template.clone(),
        })
    }

    fn fits(&self, sandbox: &Sandbox, data: &SandboxData) -> bool {
        let Some(state) = state(sandbox) else { return false };
        (self.states.is_empty() || self.states.iter().any(|wanted| wanted == state))
            && self.metadata.iter().all(|(k, v)| data.metadata.get(k) == Some(v))
            && self.template.as_ref().is_none_or(|template| *template == data.template)
            && self.started_after.is_none_or(|after| data.created_at > after)
    }
}

/// Pairs in the form that the SDKs send: a query string inside the query string, whose names and
/// values were encoded once more.
fn metadata(text: &str) -> Vec<(String, String)> {
    let once = |text: &str| {
        let bytes = percent_encoding::percent_decode_str(text);
        bytes.decode_utf8_lossy().into_owned()
    };
    form_urlencoded::parse(text.as_bytes()).map(|(k, v)| (once(&k), once(&v))).collect()
}

fn ascending(order: Option<&str>) -> Result<bool, ApiError> {
    match order {
        None | Some("desc") => Ok(false),
        Some("asc") => Ok(true),
        Some(other) => {
            Err(ApiError::invalid(format!("order: {other:?} is neither \"asc\" nor \"desc\"")))
        }
    }
}

/// `GET /v2/sandboxes`
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Result<Query<ListQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<(HeaderMap, Json<Vec<Value>>), ApiError> {
    let Query(query) = query.map_err(|e| ApiError::malformed(e.body_text()))?;
    let filter = Filter::new(&query)?;
    let ascending = ascending(query.order.as_deref())?;
    let limit = query.limit.unwrap_or(PAGE_LIMIT);
    if limit == 0 || limit > PAGE_LIMIT {
        let message = format!("limit: {limit} is not between 1 and {PAGE_LIMIT}");
        return Err(ApiError::invalid(message));
    }
    let after = query.next_token.as_deref().map(parse_token).transpose()?;
    let mut sandboxes = app.engine.sandboxes();
    if ascending {
        sandboxes.reverse();
    }
    let mut items = Vec::new();
    let mut headers = HeaderMap::new();
    let mut last = None;
    for sandbox in sandboxes {
        let data = sandbox.data();
        let position = (Reverse(data.created_at.unix_timestamp_nanos()), data.id.clone());
        let seen = after.as_ref().is_some_and(|after| match ascending {
            true => position >= *after,
            false => position <= *after,
        });
        if seen || !caller.sees(&sandbox) || !filter.fits(&sandbox, &data) {
            continue;
        }
        if items.len() == limit {
            let token = last.map(|(at, id): (OffsetDateTime, String)| token_at(at, &id));
            if let Some(token) = token.and_then(|token| HeaderValue::try_from(token).ok()) {
                headers.insert("x-next-token", token);
            }
            break;
        }
        items.push(listed(&app, &sandbox));
        last = Some((data.created_at, data.id));
    }
    Ok((headers, Json(items)))
}

/// `GET /sandboxes`: all that run.
pub async fn running(
    State(app): State<App>,
    caller: Caller,
    query: Result<Query<ListQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Vec<Value>>, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::malformed(e.body_text()))?;
    let filter = Filter::new(&ListQuery { state: Some("running".to_owned()), ..query })?;
    let sandboxes = app.engine.sandboxes();
    let fits = |s: &&Arc<Sandbox>| caller.sees(s) && filter.fits(s, &s.data());
    let found = sandboxes.iter().filter(fits);
    Ok(Json(found.map(|sandbox| listed(&app, sandbox)).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_encoded_twice() {
        // What is left of {"a b": "c&d=ü"} when the outer query string was decoded.
        let pairs = metadata("a%2520b=c%2526d%253D%25C3%25BC&plain=1");
        let wanted = [("a b", "c&d=ü"), ("plain", "1")];
        assert_eq!(pairs, wanted.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }
}
