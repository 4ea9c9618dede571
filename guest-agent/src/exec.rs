//! Commands: `POST /exec`. The request's first line says what to run, later lines feed it; the
//! answer is one frame per line. A command dies with the request that started it, unless it was
//! started in the background.

pub mod control;
mod input;
mod plan;
mod process;
mod pty;
mod pump;
mod reap;
mod signal;
mod spawn;
mod streams;
pub mod tool;

pub use plan::check_env;
pub use process::{Process, Processes};

use crate::agent::Agent;
use crate::server::{Answer, ApiError, Body};
use crate::wire::{ExecRequest, ProcessInfo, codes};
use hyper::body::Incoming;
use hyper::http::header::CONTENT_TYPE;
use hyper::http::{HeaderValue, Response};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

/// `POST /exec`.
///
/// # Errors
/// 422 when the command cannot be started, 429 when too many run.
pub async fn start(agent: &Rc<Agent>, body: Incoming) -> Answer {
    let mut lines = input::Lines::new(body);
    let Some(first) = lines.next().await? else {
        return Err(ApiError::new(400, codes::INVALID_REQUEST, "the request is empty"));
    };
    let mut request: ExecRequest = serde_json::from_slice(&first)
        .map_err(|e| ApiError::new(400, codes::INVALID_REQUEST, format!("the request: {e}")))?;
    // The machine may have been frozen while the request was on its way.
    agent.require_live()?;
    let (stdin, follow) = (request.stdin.take(), request.stdin_stream);
    let keep_open = request.stdin_open;
    let process = launch(agent, request, stdin.is_some())?;
    let frames = process.listen(true);
    if let Some(feed) = input::Feed::new(stdin, follow, keep_open, lines) {
        tokio::task::spawn_local(feed.run(process));
    }
    Ok(stream(frames))
}

/// An answer of frames.
pub fn stream(
    frames: tokio::sync::mpsc::Receiver<std::io::Result<bytes::Bytes>>,
) -> Response<Body> {
    let mut response = Response::new(Body::Stream(frames));
    let kind = HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn timeout(request: &ExecRequest) -> Result<Option<Duration>, ApiError> {
    let Some(seconds) = request.timeout_seconds else { return Ok(None) };
    match Duration::try_from_secs_f64(seconds) {
        Ok(timeout) if !timeout.is_zero() => Ok(Some(timeout)),
        _ => Err(ApiError::new(
            422,
            codes::INVALID_COMMAND,
            format!("timeout_seconds {seconds} is not a positive time"),
        )),
    }
}

fn launch(
    agent: &Rc<Agent>,
    request: ExecRequest,
    has_stdin: bool,
) -> Result<Rc<Process>, ApiError> {
    agent.processes.require_room()?;
    let timeout = timeout(&request)?;
    let (plan, user, cwd) = plan::plan(agent, &request)?;
    let (mut ends, child_ends) = match request.pty {
        Some(size) => streams::terminal(size)?,
        None => streams::pipes(has_stdin || request.stdin_stream || request.stdin_open)?,
    };
    let cgroup = agent.workload.open()?;
    let child = spawn::spawn(&plan, child_ends.borrow(), cgroup.as_ref().map(AsFd::as_fd))
        .map_err(|e| plan::refusal(&e, &request, &cwd))?;
    drop(child_ends);
    let info = ProcessInfo {
        pid: child.pid as u32,
        argv: request.argv,
        env: request.env,
        cwd,
        user: user.name,
        tag: request.tag,
        pty: request.pty.is_some(),
    };
    let (stdin, terminal) = (ends.stdin.take(), ends.terminal.take());
    let process = Rc::new(Process::new(info, request.background, stdin, terminal));
    agent.processes.add(&process);
    let follow = pump::run(Rc::clone(agent), Rc::clone(&process), child.pidfd, ends, timeout);
    tokio::task::spawn_local(follow);
    Ok(process)
}
