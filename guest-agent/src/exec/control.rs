//! Commands that were started earlier: `/processes` and what is below it.

use super::process::parse_signal;
use crate::agent::Agent;
use crate::server::{Answer, ApiError, json, no_content, read_json};
use crate::wire::{ProcessList, PtySize, SignalRequest, StdinRequest, codes};
use hyper::body::Incoming;
use hyper::http::Method;

/// `GET /processes`.
///
/// # Errors
/// None of its own.
pub fn list(agent: &Agent) -> Answer {
    json(&ProcessList { items: agent.processes.list() })
}

/// `/processes/{pid}/{action}`; `rest` is the path after `/processes/`. A stream begins with the
/// output that is still remembered, unless `replay=false` says not to.
///
/// # Errors
/// 404 for a process that does not run, 409 for what it cannot do, 422 for an unknown signal.
pub async fn act(
    agent: &Agent,
    method: &Method,
    rest: &str,
    query: &str,
    body: Incoming,
) -> Answer {
    let unknown = || {
        let text = format!("no endpoint {method} /processes/{rest}");
        ApiError::new(404, codes::NOT_FOUND, text)
    };
    let (pid, action) = rest.split_once('/').ok_or_else(unknown)?;
    let pid = pid.parse::<u32>().map_err(|_| unknown())?;
    let process = agent.processes.get(pid)?;
    match (method, action) {
        (&Method::GET, "stream") => {
            let replay = crate::query::get(query, "replay")?.is_none_or(|v| v != "false");
            return Ok(super::stream(process.listen(replay)));
        }
        (&Method::POST, "signal") => {
            let request: SignalRequest = read_json(body).await?;
            if !process.signal(parse_signal(&request.signal)?) {
                let text = format!("process {pid} has just ended");
                return Err(ApiError::new(404, codes::PROCESS_NOT_FOUND, text));
            }
        }
        (&Method::POST, "stdin") => {
            let request: StdinRequest = read_json(body).await?;
            process.write_stdin(&request.stdin.0).await?;
        }
        (&Method::POST, "stdin/close") => process.close_stdin().await,
        (&Method::POST, "resize") => {
            let size: PtySize = read_json(body).await?;
            process.resize(size)?;
        }
        _ => return Err(unknown()),
    }
    no_content()
}
