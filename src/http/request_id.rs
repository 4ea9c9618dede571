//! A request id for every request: in the reply, in error bodies, in the log and in the audit log.

use std::time::Instant;

use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use time::OffsetDateTime;
use tracing::Instrument;

use crate::audit::{Actor, Audit, Entry};
use crate::engine::ids;
use crate::listen::Peer;
use crate::log;

tokio::task_local! {
    static CURRENT: (String, String);
}

/// Id and path of the request that this task serves.
pub fn current() -> (String, String) {
    CURRENT.try_with(Clone::clone).unwrap_or_default()
}

/// Runs work that goes on for the present request on another task.
pub fn carried<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
    CURRENT.scope(current(), work)
}

/// Gives the request its id, counts it, times it, and notes it if it was to change something.
pub async fn track(State(audit): State<Audit>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = id_of(request.headers());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("none", MatchedPath::as_str).to_owned();
    let peer = request.extensions().get::<ConnectInfo<Peer>>().map(|c| c.0.0.clone());
    let span = tracing::info_span!(log::REQUEST, id = %id, %method, route = %route);
    let scope = CURRENT.scope((id.clone(), path.clone()), next.run(request));
    let mut response = scope.instrument(span.clone()).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    let (took, status) = (started.elapsed(), response.status());
    span.in_scope(|| {
        tracing::debug!(status = status.as_u16(), ms = took.as_secs_f64() * 1e3, "answered");
    });
    if is_audited(&method, status) {
        let made = response.headers().get(header::LOCATION);
        audit.note(&Entry {
            time: OffsetDateTime::now_utc(),
            request_id: id,
            actor: response.extensions().get().cloned().unwrap_or(Actor::NOBODY),
            peer,
            method: method.to_string(),
            path,
            made: made.and_then(|v| v.to_str().ok()).map(str::to_owned),
            status: status.as_u16(),
            duration_ms: (took.as_secs_f64() * 1e6).round() / 1e3,
        });
    }
    let labels = [("method", method.to_string()), ("route", route)];
    metrics::histogram!("rethaw_http_request_duration_seconds", &labels).record(took.as_secs_f64());
    let [method, route] = labels;
    let code = ("code", status.as_u16().to_string());
    metrics::counter!("rethaw_http_requests_total", &[method, route, code]).increment(1);
    response
}

/// A client's own id is kept when it is harmless in a log line.
fn id_of(headers: &HeaderMap) -> String {
    let given = headers.get("x-request-id").and_then(|v| v.to_str().ok());
    let sane = |id: &&str| {
        (1..=64).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    given.filter(sane).map_or_else(ids::new_id, str::to_owned)
}

fn is_audited(method: &Method, status: StatusCode) -> bool {
    let reads = [Method::GET, Method::HEAD, Method::OPTIONS].contains(method);
    !reads || [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&status)
}
