//! `filesystem.Filesystem`, watched folders: as a stream, or noted in the guest until asked for.

use std::time::Duration;

use axum::Json;
use axum::http::HeaderMap;
use axum::response::Response;
use futures_util::{Stream, StreamExt};
use guest_agent::client::{AgentError, full_body};
use guest_agent::wire::{WatchEvent, WatchEvents, WatchKind, WatchRequest, WatcherId};
use hyper::body::Incoming;
use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::io::StreamReader;

use super::entry;
use super::guest::Guest;
use super::path::{encode, resolve};
use crate::e2b::rpc::{Code, Opening, RpcError, StreamError, Unary, reply, timeout};

/// How long the guest may take to answer.
const QUICK: Duration = Duration::from_secs(30);
/// A silent stream says this often that it is there, unless the client wishes another interval.
const KEEPALIVE: Duration = Duration::from_secs(90);
/// Longest line of the agent's: one event.
const MAX_LINE: usize = 64 << 10;

/// Body of `WatchDir` and `CreateWatcher`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WatchBody {
    #[serde(default)]
    path: String,
    #[serde(default)]
    recursive: bool,
    #[serde(default)]
    include_entry: bool,
    #[serde(default)]
    allow_network_mounts: bool,
}

impl WatchBody {
    async fn resolve(&self, guest: &Guest) -> Result<WatchRequest, AgentError> {
        Ok(WatchRequest {
            path: resolve(&guest.agent, &self.path, &guest.user).await?,
            recursive: self.recursive,
            entries: self.include_entry,
            network: self.allow_network_mounts,
        })
    }
}

/// An event as `filesystem.FilesystemEvent`.
fn event(event: &WatchEvent) -> Result<Value, RpcError> {
    let kind = match event.kind {
        WatchKind::Create => "EVENT_TYPE_CREATE",
        WatchKind::Write => "EVENT_TYPE_WRITE",
        WatchKind::Remove => "EVENT_TYPE_REMOVE",
        WatchKind::Rename => "EVENT_TYPE_RENAME",
        WatchKind::Chmod => "EVENT_TYPE_CHMOD",
        WatchKind::Overflow => {
            let text = "more happened than could be noted, some of it is lost: look again";
            return Err(RpcError::new(Code::DataLoss, text));
        }
    };
    let name = if event.name.is_empty() { "." } else { &event.name };
    let mut told = json!({ "name": name, "type": kind });
    if let Some(entry) = &event.entry {
        told["entry"] = entry::info(entry);
    }
    Ok(told)
}

/// `WatchDir`
pub async fn watch_dir(
    guest: Guest,
    headers: HeaderMap,
    Opening(body): Opening<WatchBody>,
) -> Result<Response, StreamError> {
    let request = body.resolve(&guest).await?;
    let uri = format!(
        "/watch?path={}&recursive={}&entries={}&network={}",
        encode(&request.path),
        request.recursive,
        request.entries,
        request.network
    );
    let asked = hyper::Request::get(uri).body(full_body(""));
    let asked = asked.map_err(|e| RpcError::new(Code::InvalidArgument, e.to_string()))?;
    let answer = tokio::time::timeout(QUICK, guest.agent.send(asked)).await;
    let answer = answer.map_err(|_| {
        RpcError::new(Code::DeadlineExceeded, format!("no answer of the guest within {QUICK:?}"))
    })??;
    if answer.status() != StatusCode::OK {
        return Err(crate::http::files::refused(answer).await.into());
    }
    let started = futures_util::stream::iter([Ok(json!({ "start": {} }))]);
    let told = told(answer.into_body(), keepalive(&headers), timeout(&headers));
    Ok(reply(started.chain(told)))
}

fn keepalive(headers: &HeaderMap) -> Duration {
    let seconds =
        headers.get("keepalive-ping-interval").and_then(|v| v.to_str().ok()?.parse().ok());
    seconds.filter(|s| *s > 0).map_or(KEEPALIVE, Duration::from_secs)
}

/// What the guest tells, line by line, with a sign of life in between.
fn told(
    body: Incoming,
    keepalive: Duration,
    timeout: Option<Duration>,
) -> impl Stream<Item = Result<Value, RpcError>> + Send + 'static {
    let bytes =
        http_body_util::BodyDataStream::new(body).map(|data| data.map_err(std::io::Error::other));
    let lines =
        FramedRead::new(StreamReader::new(bytes), LinesCodec::new_with_max_length(MAX_LINE));
    let until = timeout.map(|timeout| Instant::now() + timeout);
    futures_util::stream::unfold(Some(lines), move |lines| async move {
        let mut lines = lines?;
        let pause = Instant::now() + keepalive;
        let wake = until.map_or(pause, |until| until.min(pause));
        let line = match tokio::time::timeout_at(wake, lines.next()).await {
            Ok(line) => line,
            Err(_) if until.is_some_and(|until| until <= wake) => {
                let text = "the time that the client gave the watch is up";
                return Some((Err(RpcError::new(Code::DeadlineExceeded, text)), None));
            }
            Err(_) => return Some((Ok(json!({ "keepalive": {} })), Some(lines))),
        };
        let lost = |why: String| {
            let text = format!("the connection to the sandbox ended: {why}");
            RpcError::new(Code::Unavailable, text)
        };
        let event = match line {
            None => Err(lost("no more events".to_owned())),
            Some(Err(e)) => Err(lost(e.to_string())),
            Some(Ok(line)) => serde_json::from_str::<WatchEvent>(&line)
                .map_err(|e| RpcError::new(Code::Internal, format!("an event: {e}")))
                .and_then(|e| event(&e)),
        };
        Some(match event {
            Ok(event) => (Ok(json!({ "filesystem": event })), Some(lines)),
            Err(error) => (Err(error), None),
        })
    })
}

/// `CreateWatcher`
pub async fn create(guest: Guest, Unary(body): Unary<WatchBody>) -> Result<Json<Value>, RpcError> {
    let request = body.resolve(&guest).await?;
    let made: WatcherId =
        guest.agent.call(Method::POST, "/watchers", Some(&request), QUICK).await?;
    Ok(Json(json!({ "watcherId": made.id })))
}

/// Body of the calls about one watcher.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WatcherBody {
    watcher_id: String,
}

impl WatcherBody {
    fn uri(&self) -> String {
        format!("/watchers/{}", encode(&self.watcher_id.replace('/', "-")))
    }
}

/// `GetWatcherEvents`
pub async fn events(
    guest: Guest,
    Unary(body): Unary<WatcherBody>,
) -> Result<Json<Value>, RpcError> {
    let noted: WatchEvents = guest.agent.call(Method::GET, &body.uri(), None::<&()>, QUICK).await?;
    let events: Vec<Value> = noted.items.iter().map(event).collect::<Result<_, _>>()?;
    Ok(Json(json!({ "events": events })))
}

/// `RemoveWatcher`
pub async fn remove(
    guest: Guest,
    Unary(body): Unary<WatcherBody>,
) -> Result<Json<Value>, RpcError> {
    guest.agent.call::<(), ()>(Method::DELETE, &body.uri(), None, QUICK).await?;
    Ok(Json(json!({})))
}
