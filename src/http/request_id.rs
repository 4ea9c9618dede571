//! A request id for every request: in the reply, in error bodies and in the log.

use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

use crate::engine::ids;

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

/// Gives the request its id, counts it, and times it.
pub async fn track(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let given = request.headers().get("x-request-id").and_then(|v| v.to_str().ok());
    // A client's own id is kept when it is harmless in a log line.
    let sane = |id: &&str| {
        (1..=64).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let id = given.filter(sane).map_or_else(ids::new_id, str::to_owned);
    let method = request.method().clone();
    let current = (id.clone(), request.uri().path().to_owned());
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("none", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!("request", id = %id, %method, route = %route);
    let mut response = CURRENT.scope(current, next.run(request).instrument(span)).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    let took = started.elapsed().as_secs_f64();
    let labels = [("method", method.to_string()), ("route", route)];
    metrics::histogram!("rethaw_http_request_duration_seconds", &labels).record(took);
    let [method, route] = labels;
    let code = ("code", response.status().as_u16().to_string());
    metrics::counter!("rethaw_http_requests_total", &[method, route, code]).increment(1);
    response
}
