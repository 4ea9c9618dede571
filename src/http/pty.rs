//! `GET /v1/sandboxes/{id}/pty`: a shell on a terminal, over a WebSocket.
//!
//! Binary messages are the terminal's bytes in both directions. Text messages are JSON:
//! `{"resize":{"cols":80,"rows":24}}` from the client, `{"exit":{"code":0}}` from here, last. The
//! shell ends with its connection.

use axum::extract::ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Query, State};
use axum::response::Response;
use futures_util::stream::SplitStream;
use futures_util::{SinkExt, StreamExt};
use guest_agent::client::{AgentClient, AgentError, ExecSender, ExecStream};
use guest_agent::wire::{Base64, ExecFrame, ExecInput, ExecRequest, PtySize, codes};
use serde::Deserialize;
use serde_json::json;
use std::time::Duration;

use super::App;
use super::error::ApiError;
use super::exec::agent_of;

/// How long the guest may take to start a shell.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// A client that takes nothing for this long is gone.
const SEND_DEADLINE: Duration = Duration::from_secs(60);
/// Longest message from the client: a paste comes in many.
const MAX_MESSAGE: usize = 1 << 20;

/// The parameters.
#[derive(Debug, Deserialize)]
pub struct PtyQuery {
    #[serde(default = "eighty")]
    cols: u16,
    #[serde(default = "twenty_four")]
    rows: u16,
    term: Option<String>,
    user: Option<String>,
}

fn eighty() -> u16 {
    80
}

fn twenty_four() -> u16 {
    24
}

/// The handler.
pub async fn pty(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Result<Query<PtyQuery>, axum::extract::rejection::QueryRejection>,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::malformed(e.body_text()))?;
    let agent = agent_of(&app.engine.sandbox(&id)?, "pty")?;
    let upgrade = upgrade.map_err(|e| {
        ApiError::malformed(format!("a terminal needs a WebSocket: {}", e.body_text()))
    })?;
    let shell = start(&agent, &query).await?;
    metrics::counter!("rethaw_exec_total").increment(1);
    Ok(upgrade.max_message_size(MAX_MESSAGE).on_upgrade(move |socket| converse(socket, shell)))
}

async fn start(agent: &AgentClient, query: &PtyQuery) -> Result<ExecStream, AgentError> {
    let mut request = ExecRequest {
        user: query.user.clone(),
        pty: Some(PtySize { cols: query.cols.max(1), rows: query.rows.max(1) }),
        stdin_stream: true,
        ..ExecRequest::default()
    };
    if let Some(term) = &query.term {
        request.env.insert("TERM".to_owned(), term.clone());
    }
    let shell = |path: &str| vec![path.to_owned(), "-l".to_owned()];
    request.argv = shell("/bin/bash");
    match agent.exec(&request, START_DEADLINE).await {
        Err(AgentError::Refused { error_code, .. }) if error_code == codes::PROGRAM_NOT_FOUND => {
            request.argv = shell("/bin/sh");
            agent.exec(&request, START_DEADLINE).await
        }
        started => started,
    }
}

/// What the client says in text.
#[derive(Debug, Deserialize)]
struct Told {
    resize: Option<PtySize>,
}

/// Passes keys there and bytes here. Both ways at once: a program that does not read its input must
/// not keep its output from being seen.
async fn converse(socket: WebSocket, mut shell: ExecStream) {
    let (mut to_client, from_client) = socket.split();
    let keys = shell.sender();
    let show = async {
        while let Ok(Some(frame)) = shell.next_frame().await {
            let message = match frame {
                ExecFrame::Stdout(chunk) | ExecFrame::Stderr(chunk) => {
                    let Some(bytes) = chunk.into_bytes() else { break };
                    Message::Binary(bytes.into())
                }
                ExecFrame::Exit(exit) => told(&json!({ "exit": { "code": exit.code } })),
                ExecFrame::Error(error) => told(&json!({ "error": error.message })),
                ExecFrame::Started(_) | ExecFrame::Keepalive(_) => continue,
            };
            let sent = tokio::time::timeout(SEND_DEADLINE, to_client.send(message)).await;
            if !matches!(sent, Ok(Ok(()))) {
                break;
            }
        }
    };
    tokio::select! {
        () = show => {}
        // The client is gone: the shell goes with its stream.
        () = type_keys(from_client, keys) => {}
    }
    let _ = tokio::time::timeout(SEND_DEADLINE, to_client.close()).await;
}

fn told(json: &serde_json::Value) -> Message {
    Message::Text(Utf8Bytes::from(json.to_string()))
}

/// Hands on what the client types, until it leaves.
async fn type_keys(mut from_client: SplitStream<WebSocket>, keys: ExecSender) {
    while let Some(Ok(message)) = from_client.next().await {
        let input = match message {
            Message::Binary(bytes) => ExecInput::Stdin(Base64(bytes.to_vec())),
            Message::Text(text) => match serde_json::from_str::<Told>(&text) {
                Ok(Told { resize: Some(size) }) => ExecInput::Resize(size),
                // Words of a newer client are passed over.
                _ => continue,
            },
            Message::Close(_) => return,
            // Answered by the library.
            Message::Ping(_) | Message::Pong(_) => continue,
        };
        if keys.send(&input).await.is_err() {
            return;
        }
    }
}
