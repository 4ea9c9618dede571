//! Watched folders: `GET /watch` streams what happens, one event a line; `POST /watchers` notes it
//! down for a client that comes by and asks.
//!
//! ```text
//! POST /watchers -> watching -- GET /watchers/{id}: what was noted since --> watching
//!                      \------- DELETE /watchers/{id} ---------------------> gone
//! ```
//!
//! A noted event lives in the guest's memory: a watcher outlives a pause, and a clone has its own.

mod tree;
mod watcher;

pub use watcher::Watchers;

use crate::agent::Agent;
use crate::query;
use crate::server::{Answer, ApiError, Body, json, no_content};
use crate::wire::{WatchEvents, WatchRequest, WatcherId, codes};
use bytes::Bytes;
use hyper::http::header::CONTENT_TYPE;
use hyper::http::{HeaderValue, Method, Response};
use std::io;
use tokio::sync::mpsc;
use tree::Tree;

/// Batches of events on their way to one client.
const QUEUE: usize = 16;

/// `GET /watch?path=&recursive=&entries=&network=`: ends when the client goes away.
///
/// # Errors
/// As [`Tree::new`].
pub fn stream(query: &str) -> Answer {
    let flag = |name| Ok::<_, ApiError>(query::get(query, name)?.is_some_and(|v| v == "true"));
    let request = WatchRequest {
        path: query::get(query, "path")?.unwrap_or_default(),
        recursive: flag("recursive")?,
        entries: flag("entries")?,
        network: flag("network")?,
    };
    let tree = Tree::new(&request)?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::task::spawn_local(follow(tree, sender));
    let mut response = Response::new(Body::Stream(receiver));
    let kind = HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

async fn follow(mut tree: Tree, sender: mpsc::Sender<io::Result<Bytes>>) {
    loop {
        let lines = tokio::select! {
            () = sender.closed() => return,
            events = tree.next() => events.and_then(|events| {
                let mut lines = Vec::new();
                for event in events {
                    serde_json::to_writer(&mut lines, &event)?;
                    lines.push(b'\n');
                }
                Ok(lines.into())
            }),
        };
        let failed = lines.is_err();
        if sender.send(lines).await.is_err() || failed {
            return;
        }
    }
}

/// `POST /watchers`.
///
/// # Errors
/// As [`Tree::new`], and 429 when there are too many.
pub fn add(agent: &Agent, request: &WatchRequest) -> Answer {
    json(&WatcherId { id: agent.watchers.add(request)? })
}

/// `GET` and `DELETE /watchers/{id}`.
///
/// # Errors
/// 404 `watcher_not_found`.
pub fn act(agent: &Agent, method: &Method, id: &str) -> Answer {
    match *method {
        Method::GET => json(&WatchEvents { items: agent.watchers.take(id)? }),
        Method::DELETE => {
            agent.watchers.remove(id)?;
            no_content()
        }
        _ => {
            let text = format!("/watchers/{id} does not take {method}");
            Err(ApiError::new(405, codes::METHOD_NOT_ALLOWED, text))
        }
    }
}
