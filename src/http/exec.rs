//! `POST /v1/sandboxes/{id}/exec`: a command, its output as NDJSON frames or, with
//! `?buffered=true`, as one object.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use guest_agent::client::{AgentClient, AgentError, ExecStream};
use guest_agent::wire::{Base64, Chunk, ExecFrame, ExecInput, ExecRequest};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::App;
use super::error::{ApiError, ErrorCode};
use super::json::JsonBody;
use super::openapi::{argv_schema, env_schema};
use super::sandboxes::check_env;
use crate::engine::sandbox::{InUse, Sandbox, State as SandboxState};

/// How long the guest may take to start a command.
pub const START_DEADLINE: Duration = Duration::from_secs(30);
/// Most that a buffered reply holds of each stream; more is cut and said to be.
const MAX_BUFFERED: usize = 8 << 20;
const MAX_TIMEOUT_SECONDS: f64 = 24.0 * 3600.0;

/// A command
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Exec)]
pub struct ExecBody {
    #[schema(schema_with = argv_schema)]
    argv: Vec<String>,
    #[serde(default)]
    #[schema(schema_with = env_schema)]
    env: BTreeMap<String, String>,
    /// Folder to run it in; the user's home when absent
    cwd: Option<String>,
    /// User to run it as; `root` when absent
    user: Option<String>,
    /// It is killed after this time
    #[schema(exclusive_minimum = 0.0, maximum = 86_400)]
    timeout_seconds: Option<f64>,
    /// Standard input, whole
    stdin: Option<String>,
    /// The same for input that is not text; not together with `stdin`
    #[schema(content_encoding = "base64")]
    stdin_base64: Option<String>,
}

/// How the output comes
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ExecQuery {
    /// As one object at the end instead of frames
    #[serde(default)]
    buffered: bool,
}

/// A command's whole output
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ExecResult)]
struct BufferedReply {
    /// Exit code; 128 plus the signal's number when a signal ended it
    exit_code: i32,
    /// Name of the signal that ended it
    signal: Option<String>,
    /// It was killed because its time was up
    timed_out: bool,
    /// From start to end
    duration_ms: u64,
    /// Standard output
    stdout: String,
    /// Standard error
    stderr: String,
    /// `base64`, or absent for text
    #[schema(nullable = false)]
    #[serde(skip_serializing_if = "Option::is_none")]
    stdout_encoding: Option<&'static str>,
    /// `base64`, or absent for text
    #[schema(nullable = false)]
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr_encoding: Option<&'static str>,
    /// A stream was longer than is kept
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    truncated: bool,
}

/// A running sandbox's agent, or why there is none.
pub fn agent_of(sandbox: &Arc<Sandbox>, action: &'static str) -> Result<AgentClient, ApiError> {
    sandbox.agent().ok_or_else(|| {
        let (id, state) = (sandbox.data().id, sandbox.state());
        let wanted = SandboxState::Running.as_str();
        crate::engine::SandboxError::WrongState { id, state, action, wanted }.into()
    })
}

fn check(body: &ExecBody) -> Result<(), ApiError> {
    if body.argv.first().is_none_or(String::is_empty) {
        let message = "argv: needs at least the program's name, as in [\"ls\", \"-l\"]";
        return Err(ApiError::invalid(message));
    }
    if body.argv.iter().any(|a| a.contains('\0')) {
        return Err(ApiError::invalid("argv: an argument holds a NUL"));
    }
    if body.stdin.is_some() && body.stdin_base64.is_some() {
        return Err(ApiError::invalid("stdin_base64: give either this or stdin, not both"));
    }
    if let Some(t) = body.timeout_seconds
        && !(t > 0.0 && t <= MAX_TIMEOUT_SECONDS)
    {
        let message =
            format!("timeout_seconds: {t} is not above 0 and up to {MAX_TIMEOUT_SECONDS}");
        return Err(ApiError::invalid(message));
    }
    check_env(&body.env)
}

/// Run a command
///
/// The output comes as frames, one JSON object a line: `started`, then `stdout`, `stderr` and
/// `keepalive`, then exactly one `exit` or `error`. When the client goes away the command is killed.
#[utoipa::path(post, path = "/sandboxes/{id}/exec", tag = "sandboxes", operation_id = "exec",
    params(("id" = String, Path, description = "A sandbox", pattern = "^[a-z0-9]{20}$"), ExecQuery),
    request_body = ExecBody,
    responses((status = 200, description = "Its output", content(
            (ExecFrame = "application/x-ndjson"), (BufferedReply = "application/json"))),
        (status = 404, description = "`sandbox_not_found`"),
        (status = 409, description = "`wrong_state`"),
        (status = 422, description = "`invalid_field`, `program_not_found`, \
            `program_not_executable`, `user_not_found`, `cwd_not_found`, `invalid_command`"),
        (status = 502, description = "`guest_unreachable`"),
        (status = 504, description = "`guest_timeout`")))]
pub async fn exec(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Result<Query<ExecQuery>, axum::extract::rejection::QueryRejection>,
    JsonBody(body): JsonBody<ExecBody>,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::malformed(e.body_text()))?;
    check(&body)?;
    let binary = body.stdin_base64.map(|text| STANDARD.decode(text)).transpose();
    let binary = binary.map_err(|e| ApiError::invalid(format!("stdin_base64: {e}")))?;
    let sandbox = app.engine.sandbox(&id)?;
    let agent = agent_of(&sandbox, "exec")?;
    let request = ExecRequest {
        argv: body.argv,
        env: body.env,
        cwd: body.cwd,
        user: body.user,
        timeout_seconds: body.timeout_seconds,
        stdin: body.stdin,
        stdin_stream: binary.is_some(),
        ..ExecRequest::default()
    };
    let stream = agent.exec(&request, START_DEADLINE).await?;
    if let Some(bytes) = binary {
        feed(&stream, bytes);
    }
    metrics::counter!("rethaw_exec_total").increment(1);
    let in_use = sandbox.in_use();
    if query.buffered { buffered(stream).await } else { Ok(streamed(stream, in_use)) }
}

/// Sends standard input beside the output being read, or both sides could wait for each other.
fn feed(stream: &ExecStream, bytes: Vec<u8>) {
    let sender = stream.sender();
    tokio::spawn(async move {
        for part in bytes.chunks(64 << 10) {
            if sender.send(&ExecInput::Stdin(Base64(part.to_vec()))).await.is_err() {
                return;
            }
        }
        let _ = sender.send(&ExecInput::Eof(true)).await;
    });
}

/// Frames as the guest wrote them, one a line. When the client goes away the stream is dropped, and
/// with it the command.
fn streamed(stream: ExecStream, in_use: InUse) -> Response {
    let lines = futures_util::stream::unfold(Some((stream, in_use)), |state| async move {
        let (mut stream, in_use) = state?;
        match stream.next_line().await {
            Ok(Some(line)) => {
                let mut out = Vec::with_capacity(line.len() + 1);
                out.extend_from_slice(&line);
                out.push(b'\n');
                Some((Ok::<_, std::convert::Infallible>(Bytes::from(out)), Some((stream, in_use))))
            }
            Ok(None) => None,
            Err(e) => Some((Ok(broken(&e)), None)),
        }
    });
    let body = Body::from_stream(lines);
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// The last frame of a stream whose VM went away.
fn broken(e: &AgentError) -> Bytes {
    let frame = serde_json::json!({
        "type": "error", "error_code": ErrorCode::GUEST_UNREACHABLE, "message": e.to_string(),
    });
    Bytes::from(format!("{frame}\n"))
}

async fn buffered(mut stream: ExecStream) -> Result<Response, ApiError> {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut truncated = false;
    let mut keep = |to: &mut Vec<u8>, bytes: &[u8]| {
        let room = MAX_BUFFERED - to.len();
        truncated |= bytes.len() > room;
        to.extend_from_slice(&bytes[..bytes.len().min(room)]);
    };
    let exit = loop {
        match stream.next_frame().await? {
            Some(ExecFrame::Stdout(chunk)) => keep(&mut out, &bytes_of(chunk)?),
            Some(ExecFrame::Stderr(chunk)) => keep(&mut err, &bytes_of(chunk)?),
            Some(ExecFrame::Exit(exit)) => break exit,
            Some(ExecFrame::Error(e)) => {
                return Err(ApiError::new(
                    StatusCode::BAD_GATEWAY,
                    ErrorCode::of_agent(&e.error_code),
                    e.message,
                ));
            }
            Some(_) => {}
            None => {
                let message = "the command's stream ended without its exit".to_owned();
                return Err(AgentError::Disconnected(message).into());
            }
        }
    };
    let (stdout, stdout_encoding) = text_or_base64(out);
    let (stderr, stderr_encoding) = text_or_base64(err);
    let reply = BufferedReply {
        exit_code: exit.code,
        signal: exit.signal,
        timed_out: exit.timed_out,
        duration_ms: exit.duration_ms,
        stdout,
        stderr,
        stdout_encoding,
        stderr_encoding,
        truncated,
    };
    Ok(Json(reply).into_response())
}

fn bytes_of(chunk: Chunk) -> Result<Vec<u8>, AgentError> {
    chunk.into_bytes().ok_or_else(|| AgentError::Protocol("output is not base64".to_owned()))
}

fn text_or_base64(bytes: Vec<u8>) -> (String, Option<&'static str>) {
    match String::from_utf8(bytes) {
        Ok(text) => (text, None),
        Err(e) => (STANDARD.encode(e.as_bytes()), Some("base64")),
    }
}
