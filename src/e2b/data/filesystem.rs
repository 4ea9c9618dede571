//! `filesystem.Filesystem`: files and folders by name; contents go through `/files`.

use std::time::Duration;

use axum::Json;
use guest_agent::client::AgentError;
use guest_agent::wire::{DirEntries, DirEntry, MkdirRequest, MoveRequest};
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::entry;
use super::guest::Guest;
use super::path::{encode, resolve};
use crate::e2b::rpc::{RpcError, Unary};

/// How long the guest may take; a large tree takes a while to be listed or removed.
const DEADLINE: Duration = Duration::from_secs(60);

/// Body of the calls about one path.
#[derive(Debug, Deserialize)]
pub struct PathRequest {
    #[serde(default)]
    path: String,
}

impl PathRequest {
    async fn resolve(&self, guest: &Guest) -> Result<String, AgentError> {
        resolve(&guest.agent, &self.path, &guest.user).await
    }
}

fn reply(entry: &DirEntry) -> Json<Value> {
    Json(json!({ "entry": entry::info(entry) }))
}

/// `Stat`
pub async fn stat(guest: Guest, Unary(body): Unary<PathRequest>) -> Result<Json<Value>, RpcError> {
    let uri = format!("/stat?path={}", encode(&body.resolve(&guest).await?));
    Ok(reply(&guest.agent.call(Method::GET, &uri, None::<&()>, DEADLINE).await?))
}

/// Body of `ListDir`.
#[derive(Debug, Deserialize)]
pub struct ListDirRequest {
    #[serde(flatten)]
    at: PathRequest,
    #[serde(default)]
    depth: u32,
}

/// `ListDir`; a depth of 0 means 1.
pub async fn list_dir(
    guest: Guest,
    Unary(body): Unary<ListDirRequest>,
) -> Result<Json<Value>, RpcError> {
    let path = body.at.resolve(&guest).await?;
    let uri = format!("/dir?path={}&depth={}", encode(&path), body.depth.max(1));
    let found: DirEntries = guest.agent.call(Method::GET, &uri, None::<&()>, DEADLINE).await?;
    let entries: Vec<Value> = found.items.iter().map(entry::info).collect();
    Ok(Json(json!({ "entries": entries })))
}

/// `MakeDir`
pub async fn make_dir(
    guest: Guest,
    Unary(body): Unary<PathRequest>,
) -> Result<Json<Value>, RpcError> {
    let path = body.resolve(&guest).await?;
    let request = MkdirRequest { path, user: Some(guest.user) };
    Ok(reply(&guest.agent.call(Method::POST, "/dir", Some(&request), DEADLINE).await?))
}

/// Body of `Move`.
#[derive(Debug, Deserialize)]
pub struct MoveBody {
    #[serde(default)]
    source: String,
    #[serde(default)]
    destination: String,
}

/// `Move`
pub async fn rename(guest: Guest, Unary(body): Unary<MoveBody>) -> Result<Json<Value>, RpcError> {
    let from = resolve(&guest.agent, &body.source, &guest.user).await?;
    let to = resolve(&guest.agent, &body.destination, &guest.user).await?;
    let request = MoveRequest { from, to, user: Some(guest.user) };
    Ok(reply(&guest.agent.call(Method::POST, "/move", Some(&request), DEADLINE).await?))
}

/// `Remove`: what is not there is removed already.
pub async fn remove(
    guest: Guest,
    Unary(body): Unary<PathRequest>,
) -> Result<Json<Value>, RpcError> {
    let uri = format!("/files?recursive=true&path={}", encode(&body.resolve(&guest).await?));
    match guest.agent.call::<(), ()>(Method::DELETE, &uri, None, DEADLINE).await {
        Ok(()) | Err(AgentError::Refused { status: 404, .. }) => Ok(Json(json!({}))),
        Err(e) => Err(e.into()),
    }
}
