//! `GET /v1/sandboxes/{id}/pty`: a terminal over a WebSocket.
//!
//! Binary messages are the terminal's bytes in both directions. Text messages are JSON:
//! `{"resize":{"cols":80,"rows":24}}` from the client, at the end one `{"exit":{"code":0}}` or
//! `{"error":{"error_code":"...","message":"..."}}` from here. The shell ends with the connection.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{Path, Query, State};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::SplitSink;
use futures_util::{SinkExt, StreamExt};
use guest_agent::client::{AgentError, ExecSender, ExecStream};
use guest_agent::wire::{Base64, ErrorBody, ExecFrame, ExecInput, ExecRequest, PtySize};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::IntoParams;

use super::App;
use super::error::{ApiError, ErrorCode};
use super::exec::{START_DEADLINE, agent_of};

/// A login shell: bash where there is one.
const SHELL: &str = "if command -v bash >/dev/null; then exec bash -l; else exec sh -l; fi";
/// Longest message from a client: a very large paste.
const MAX_MESSAGE: usize = 1 << 20;
/// Longest that a client may take for one message.
const SEND_DEADLINE: Duration = Duration::from_secs(60);

/// The terminal
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PtyQuery {
    /// Columns; 80 when absent
    #[param(minimum = 1, maximum = 1000)]
    cols: Option<u16>,
    /// Rows; 24 when absent
    #[param(minimum = 1, maximum = 1000)]
    rows: Option<u16>,
    /// Kind of terminal; `xterm` when absent
    #[param(pattern = "^[A-Za-z0-9._+-]{1,64}$")]
    term: Option<String>,
    /// User to run the shell as; `root` when absent
    user: Option<String>,
}

impl PtyQuery {
    fn request(self) -> Result<ExecRequest, ApiError> {
        let within = |name: &str, value: Option<u16>, usual| match value.unwrap_or(usual) {
            value @ 1..=1000 => Ok(value),
            value => Err(ApiError::invalid(format!("{name}: {value} is not between 1 and 1000"))),
        };
        let size =
            PtySize { cols: within("cols", self.cols, 80)?, rows: within("rows", self.rows, 24)? };
        let term = self.term.unwrap_or_else(|| "xterm".to_owned());
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"._+-".contains(&b);
        if !(1..=64).contains(&term.len()) || !term.bytes().all(fits) {
            return Err(ApiError::invalid(format!("term: {term:?} is no name of a terminal")));
        }
        Ok(ExecRequest {
            argv: ["/bin/sh", "-c", SHELL].map(str::to_owned).to_vec(),
            env: BTreeMap::from([("TERM".to_owned(), term)]),
            user: self.user,
            stdin_stream: true,
            pty: Some(size),
            ..ExecRequest::default()
        })
    }
}

/// Open a terminal
///
/// A WebSocket. Binary messages are the terminal's bytes in both directions; text messages are JSON:
/// `{"resize":{"cols":80,"rows":24}}` from the client, one `{"exit":{"code":0}}` at the end.
#[utoipa::path(get, path = "/sandboxes/{id}/pty", tag = "sandboxes", operation_id = "open_pty",
    params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$"), PtyQuery),
    responses((status = 101, description = "The WebSocket"),
        (status = 409, description = "`wrong_state`"),
        (status = 422, description = "`invalid_field`, `user_not_found`"),
        (status = 426, description = "`websocket_needed`"),
        (status = 502, description = "`guest_unreachable`"),
        (status = 504, description = "`guest_timeout`")))]
pub async fn pty(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Result<Query<PtyQuery>, axum::extract::rejection::QueryRejection>,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::malformed(e.body_text()))?;
    let request = query.request()?;
    let sandbox = app.engine.sandbox(&id)?;
    let agent = agent_of(&sandbox, "pty")?;
    let upgrade = upgrade.map_err(|e| ApiError::websocket_needed(&e.body_text()))?;
    // Before the upgrade: a shell that does not start is an answer with a status.
    let shell = agent.exec(&request, START_DEADLINE).await?;
    metrics::counter!("rethaw_exec_total").increment(1);
    Ok(upgrade.max_message_size(MAX_MESSAGE).on_upgrade(|socket| converse(socket, shell)))
}

#[derive(Debug, Deserialize)]
struct Told {
    resize: Option<PtySize>,
}

/// Passes bytes both ways until either side ends; dropping the stream kills the shell.
async fn converse(socket: WebSocket, mut shell: ExecStream) {
    let (mut out, mut typed) = socket.split();
    let input = shell.sender();
    let typing = async {
        while let Some(Ok(message)) = typed.next().await {
            if pass_on(&input, message).await.is_err() {
                // The shell is about to say how it ended.
                std::future::pending::<()>().await;
            }
        }
    };
    let showing = async {
        let last = loop {
            match shell.next_frame().await {
                Ok(Some(ExecFrame::Stdout(chunk) | ExecFrame::Stderr(chunk))) => {
                    let bytes = chunk.into_bytes().unwrap_or_default();
                    if !send(&mut out, Message::Binary(Bytes::from(bytes))).await {
                        return;
                    }
                }
                Ok(Some(ExecFrame::Exit(exit))) => break json!({"exit": {"code": exit.code}}),
                Ok(Some(ExecFrame::Error(e))) => break error(&e),
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(e) => {
                    let error_code = ErrorCode::GUEST_UNREACHABLE.to_string();
                    break error(&ErrorBody { error_code, message: e.to_string() });
                }
            }
        };
        send(&mut out, Message::Text(last.to_string().into())).await;
        let frame = CloseFrame { code: close_code::NORMAL, reason: "".into() };
        send(&mut out, Message::Close(Some(frame))).await;
    };
    tokio::select! {
        () = typing => {}
        () = showing => {}
    }
}

fn error(e: &ErrorBody) -> Value {
    json!({"error": e})
}

async fn pass_on(input: &ExecSender, message: Message) -> Result<(), AgentError> {
    match message {
        Message::Binary(bytes) => input.send(&ExecInput::Stdin(Base64(bytes.to_vec()))).await,
        Message::Text(text) => match serde_json::from_str(&text) {
            Ok(Told { resize: Some(size) }) => input.send(&ExecInput::Resize(size)).await,
            // Words of a newer client are passed over.
            _ => Ok(()),
        },
        Message::Ping(_) | Message::Pong(_) | Message::Close(_) => Ok(()),
    }
}

async fn send(out: &mut SplitSink<WebSocket, Message>, message: Message) -> bool {
    matches!(tokio::time::timeout(SEND_DEADLINE, out.send(message)).await, Ok(Ok(())))
}
