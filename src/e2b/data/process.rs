//! `process.Process`: commands and terminals. What is started here outlives its stream, as E2B's
//! clients expect: they disconnect and connect again; its own time limit or a signal ends it.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::response::Response;
use guest_agent::client::AgentClient;
use guest_agent::wire::{
    Base64, ExecRequest, ProcessInfo, ProcessList, PtySize, SignalRequest, StdinRequest,
};
use hyper::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::events::{Output, events};
use super::guest::Guest;
use super::path;
use crate::e2b::rpc::{
    Code, Envelopes, Opening, RpcError, StreamError, Unary, parse, reply, timeout,
};

/// How long the guest may take for a call that should be quick.
const QUICK: Duration = Duration::from_secs(30);

#[derive(Debug, Deserialize)]
struct Config {
    cmd: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    envs: BTreeMap<String, String>,
    cwd: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Pty {
    size: Size,
}

#[derive(Debug, Deserialize)]
struct Size {
    #[serde(default)]
    cols: u32,
    #[serde(default)]
    rows: u32,
}

impl From<Size> for PtySize {
    fn from(size: Size) -> Self {
        let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        Self { cols: cells(size.cols), rows: cells(size.rows) }
    }
}

/// Body of `Start`.
#[derive(Debug, Deserialize)]
pub struct StartRequest {
    process: Config,
    pty: Option<Pty>,
    tag: Option<String>,
    // Clients from before there was this field rely on an open input.
    #[serde(default = "yes")]
    stdin: Option<bool>,
}

#[allow(clippy::unnecessary_wraps, reason = "the field's default")]
fn yes() -> Option<bool> {
    Some(true)
}

/// `Start`: the events of a new command, from its start to its end.
pub async fn start(
    guest: Guest,
    headers: HeaderMap,
    Opening(body): Opening<StartRequest>,
) -> Result<Response, StreamError> {
    let Config { cmd, args, envs, cwd } = body.process;
    let cwd = match cwd.filter(|cwd| !cwd.is_empty()) {
        Some(cwd) => Some(path::resolve(&guest.agent, &cwd, &guest.user).await?),
        None => None,
    };
    let output = if body.pty.is_some() { Output::Terminal } else { Output::Pipes };
    let request = ExecRequest {
        argv: [cmd].into_iter().chain(args).collect(),
        env: envs,
        cwd,
        user: Some(guest.user),
        timeout_seconds: timeout(&headers).map(|timeout| timeout.as_secs_f64()),
        pty: body.pty.map(|pty| pty.size.into()),
        background: true,
        stdin_open: body.stdin.unwrap_or(true),
        tag: body.tag,
        ..ExecRequest::default()
    };
    let frames = guest.agent.exec(&request, QUICK).await?;
    metrics::counter!("rethaw_exec_total").increment(1);
    // The guest ends the command when its time is up, and says so.
    Ok(reply(events(frames, output, None)))
}

/// How a process is named.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selector {
    /// By its id.
    Pid(u32),
    /// By the name its client gave it.
    Tag(String),
}

/// Body of the calls that need nothing else.
#[derive(Debug, Deserialize)]
pub struct ProcessRequest {
    process: Selector,
}

async fn running(agent: &AgentClient) -> Result<Vec<ProcessInfo>, RpcError> {
    let list: ProcessList = agent.call(Method::GET, "/processes", None::<&()>, QUICK).await?;
    Ok(list.items)
}

async fn find(agent: &AgentClient, selector: &Selector) -> Result<ProcessInfo, RpcError> {
    let is_it = |process: &ProcessInfo| match selector {
        Selector::Pid(pid) => process.pid == *pid,
        Selector::Tag(tag) => process.tag.as_ref() == Some(tag),
    };
    running(agent).await?.into_iter().find(is_it).ok_or_else(|| {
        let text = match selector {
            Selector::Pid(pid) => format!("no process {pid} is running"),
            Selector::Tag(tag) => format!("no process tagged {tag:?} is running"),
        };
        RpcError::new(Code::NotFound, text)
    })
}

async fn pid(agent: &AgentClient, selector: &Selector) -> Result<u32, RpcError> {
    match selector {
        Selector::Pid(pid) => Ok(*pid),
        Selector::Tag(_) => Ok(find(agent, selector).await?.pid),
    }
}

/// Does something to a process that has no answer.
async fn act<B: Serialize>(
    guest: &Guest,
    selector: &Selector,
    action: &str,
    body: &B,
) -> Result<Json<Value>, RpcError> {
    let path = format!("/processes/{}/{action}", pid(&guest.agent, selector).await?);
    guest.agent.call::<_, ()>(Method::POST, &path, Some(body), QUICK).await?;
    Ok(Json(json!({})))
}

/// `Connect`: the events of a running command, from now on.
pub async fn connect(
    guest: Guest,
    headers: HeaderMap,
    Opening(body): Opening<ProcessRequest>,
) -> Result<Response, StreamError> {
    let process = find(&guest.agent, &body.process).await?;
    let output = if process.pty { Output::Terminal } else { Output::Pipes };
    let frames = guest.agent.attach(process.pid, false, QUICK).await?;
    Ok(reply(events(frames, output, timeout(&headers))))
}

/// `List`
pub async fn list(guest: Guest) -> Result<Json<Value>, RpcError> {
    let info = |process: ProcessInfo| {
        let mut argv = process.argv.into_iter();
        let mut info = json!({
            "pid": process.pid,
            "config": {
                "cmd": argv.next(),
                "args": argv.collect::<Vec<_>>(),
                "envs": process.env,
                "cwd": process.cwd,
            },
        });
        if let Some(tag) = process.tag {
            info["tag"] = tag.into();
        }
        info
    };
    let processes: Vec<Value> = running(&guest.agent).await?.into_iter().map(info).collect();
    Ok(Json(json!({ "processes": processes })))
}

/// Bytes for a command's input or terminal.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Input {
    Stdin(Base64),
    Pty(Base64),
}

impl Input {
    fn into_request(self) -> StdinRequest {
        match self {
            Self::Stdin(stdin) | Self::Pty(stdin) => StdinRequest { stdin },
        }
    }
}

/// Body of `SendInput`.
#[derive(Debug, Deserialize)]
pub struct SendInputRequest {
    process: Selector,
    input: Input,
}

/// `SendInput`
pub async fn send_input(
    guest: Guest,
    Unary(body): Unary<SendInputRequest>,
) -> Result<Json<Value>, RpcError> {
    act(&guest, &body.process, "stdin", &body.input.into_request()).await
}

/// A message of `StreamInput`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StreamInput {
    Start(ProcessRequest),
    Data(InputData),
    Keepalive(serde::de::IgnoredAny),
}

#[derive(Debug, Deserialize)]
struct InputData {
    input: Input,
}

/// `StreamInput`: what a client writes bit by bit, in one request.
pub async fn stream_input(guest: Guest, request: Request) -> Result<Response, StreamError> {
    let mut messages = Envelopes::new(request)?;
    let mut to: Option<Selector> = None;
    while let Some(message) = messages.next().await? {
        match (parse(&message)?, &to) {
            (StreamInput::Start(start), None) => {
                let pid = find(&guest.agent, &start.process).await?.pid;
                to = Some(Selector::Pid(pid));
            }
            (StreamInput::Data(data), Some(to)) => {
                drop(act(&guest, to, "stdin", &data.input.into_request()).await?);
            }
            (StreamInput::Keepalive(_), _) => {}
            (StreamInput::Start(_), Some(_)) => {
                return Err(RpcError::new(Code::InvalidArgument, "start: sent twice").into());
            }
            (StreamInput::Data(_), None) => {
                return Err(RpcError::new(Code::InvalidArgument, "data: sent before start").into());
            }
        }
    }
    Ok(reply(futures_util::stream::iter([Ok(json!({}))])))
}

/// Body of `SendSignal`.
#[derive(Debug, Deserialize)]
pub struct SendSignalRequest {
    process: Selector,
    #[serde(default)]
    signal: String,
}

/// `SendSignal`
pub async fn send_signal(
    guest: Guest,
    Unary(body): Unary<SendSignalRequest>,
) -> Result<Json<Value>, RpcError> {
    let signal = match body.signal.as_str() {
        "SIGNAL_SIGTERM" => "SIGTERM",
        "SIGNAL_SIGKILL" => "SIGKILL",
        other => {
            let text = format!("signal: {other:?} is neither SIGNAL_SIGTERM nor SIGNAL_SIGKILL");
            return Err(RpcError::new(Code::InvalidArgument, text));
        }
    };
    let request = SignalRequest { signal: signal.to_owned() };
    act(&guest, &body.process, "signal", &request).await
}

/// `CloseStdin`
pub async fn close_stdin(
    guest: Guest,
    Unary(body): Unary<ProcessRequest>,
) -> Result<Json<Value>, RpcError> {
    act(&guest, &body.process, "stdin/close", &json!({})).await
}

/// Body of `Update`.
#[derive(Debug, Deserialize)]
pub struct UpdateRequest {
    process: Selector,
    pty: Option<Pty>,
}

/// `Update`: a terminal gets another size.
pub async fn update(
    guest: Guest,
    Unary(body): Unary<UpdateRequest>,
) -> Result<Json<Value>, RpcError> {
    match body.pty {
        Some(pty) => act(&guest, &body.process, "resize", &PtySize::from(pty.size)).await,
        None => Ok(Json(json!({}))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_read_as_the_sdks_write_them() {
        let start: StartRequest = parse(
            br#"{"process":{"cmd":"/bin/bash","args":["-l","-c","ls"],"envs":{"A":"b"}},"stdin":false}"#,
        )
        .unwrap();
        assert_eq!((start.process.args.len(), start.stdin), (3, Some(false)));
        let start: StartRequest =
            parse(br#"{"process":{"cmd":"sh"},"pty":{"size":{"cols":80,"rows":24}}}"#).unwrap();
        assert_eq!(start.stdin, Some(true), "an absent field means an open input");
        assert_eq!(PtySize::from(start.pty.unwrap().size), PtySize { cols: 80, rows: 24 });
        let input: SendInputRequest =
            parse(br#"{"process":{"pid":42},"input":{"stdin":"eA=="}}"#).unwrap();
        assert_eq!(input.process, Selector::Pid(42));
        assert_eq!(input.input.into_request().stdin.0, b"x");
        let by_tag: ProcessRequest = parse(br#"{"process":{"tag":"web"}}"#).unwrap();
        assert_eq!(by_tag.process, Selector::Tag("web".to_owned()));
        let keepalive: StreamInput = parse(br#"{"keepalive":{}}"#).unwrap();
        assert!(matches!(keepalive, StreamInput::Keepalive(_)));
    }
}
