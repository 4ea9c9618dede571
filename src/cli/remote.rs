//! A command in a sandbox: the request, its streams, and the exit code for this process.
//!
//! Exit codes are those of `docker exec`: the command's own, 126 for a program that cannot be run,
//! 127 for one that is not there, 128+n for a signal, 125 when rethaw itself failed.

mod frames;
mod input;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hyper::Method;
use serde::Serialize;
use serde_json::Value;

use super::client::{Client, ClientError, IDLE, Next, QUICK};
use super::output::{self, OutputClosed};
use super::sandbox::Sandbox;
use super::stdin::Input;
use frames::{Event, Lines};
use guest_agent::wire::{ErrorBody, codes};

/// rethaw itself failed.
pub const OWN_FAILURE: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// What a command gets that writes to a closed pipe: 128 + SIGPIPE.
const PIPE_CLOSED: u8 = 141;
/// How long the service may take to start a command.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// Time beyond a command's own limit that a buffered reply may take.
const BUFFERED_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// A command to run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Command {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables for it alone.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Folder to run in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User to run as.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Limit of its run time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<f64>,
    // Set by `input::attach`; which of the two depends on the bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stdin: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stdin_base64: Option<String>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ending {
    /// Exit code for this process.
    pub code: u8,
    /// From the request to the first output, if there was any.
    pub first_output: Option<Duration>,
}

/// Runs a command and passes its output through as it comes.
pub async fn stream(
    client: &Client,
    id: &str,
    command: Command,
    input: Input,
) -> anyhow::Result<Ending> {
    let command = input::attach(client, id, command, input).await?;
    let path = format!("/v1/sandboxes/{id}/exec");
    let start = Instant::now();
    let mut ending = Ending { code: OWN_FAILURE, first_output: None };
    let response = match client.send_json(Method::POST, &path, Some(&command), START_DEADLINE).await
    {
        Ok(response) => response,
        Err(e) => return refused(e).map(|code| Ending { code, ..ending }),
    };
    let mut bytes = client.frames(response);
    let mut lines = Lines::default();
    loop {
        while let Some(event) = lines.next_event()? {
            match event {
                Event::Output { error, bytes } => {
                    ending.first_output.get_or_insert_with(|| start.elapsed());
                    let written =
                        if error { output::write_error(&bytes) } else { output::write(&bytes) };
                    match written {
                        Err(e) if e.is::<OutputClosed>() => {
                            return Ok(Ending { code: PIPE_CLOSED, ..ending });
                        }
                        other => other?,
                    }
                }
                Event::Exit(exit) => {
                    if exit.timed_out {
                        output::note("the command's time was up, so it was killed");
                    }
                    return Ok(Ending { code: exit_code(exit.code), ..ending });
                }
                Event::Error(error) => {
                    return Ok(Ending { code: failed_to_run(&error), ..ending });
                }
            }
        }
        match bytes.next_within(IDLE).await? {
            Next::Bytes(more) => lines.push(&more)?,
            Next::Silence => check_alive(client, id).await?,
            Next::End => anyhow::bail!(
                "sandbox {id}: the output ended without the command's exit code; the command or \
                 its sandbox is gone"
            ),
        }
    }
}

/// Runs a command and returns its whole output as the API's JSON, with the exit code.
pub async fn buffered(
    client: &Client,
    id: &str,
    command: Command,
    input: Input,
) -> anyhow::Result<(Option<Value>, u8)> {
    let command = input::attach(client, id, command, input).await?;
    let path = format!("/v1/sandboxes/{id}/exec?buffered=true");
    let limit = command.timeout_seconds.map(Duration::try_from_secs_f64).and_then(Result::ok);
    let deadline = limit.map_or(BUFFERED_DEADLINE, |limit| limit + START_DEADLINE);
    let reply: Value = match client.json(Method::POST, &path, Some(&command), deadline).await {
        Ok(reply) => reply,
        Err(e) => return refused(e).map(|code| (None, code)),
    };
    let code = reply["exit_code"].as_i64().and_then(|code| i32::try_from(code).ok());
    let code = code.context("the service's answer has no exit_code")?;
    Ok((Some(reply), exit_code(code)))
}

/// A silent stream is fine as long as the sandbox is there: a command may have nothing to say.
async fn check_alive(client: &Client, id: &str) -> anyhow::Result<()> {
    let path = format!("/v1/sandboxes/{id}");
    let sandbox: Sandbox = client.json(Method::GET, &path, None::<&Value>, QUICK).await?;
    anyhow::ensure!(sandbox.state == "running", "sandbox {id} is {} now", sandbox.state);
    Ok(())
}

/// Turns a refusal that is about the program into its exit code and leaves the others as they are.
fn refused(e: ClientError) -> anyhow::Result<u8> {
    if let ClientError::Api(problem) = &e {
        let error =
            ErrorBody { error_code: problem.error_code.clone(), message: problem.message.clone() };
        let code = failure_code(&error.error_code);
        if code != OWN_FAILURE {
            return Ok(failed_to_run(&error));
        }
    }
    Err(e.into())
}

fn failed_to_run(error: &ErrorBody) -> u8 {
    output::note(&error.message);
    failure_code(&error.error_code)
}

fn failure_code(error_code: &str) -> u8 {
    match error_code {
        codes::PROGRAM_NOT_FOUND => NOT_FOUND,
        codes::PROGRAM_NOT_EXECUTABLE => NOT_EXECUTABLE,
        _ => OWN_FAILURE,
    }
}

/// A remote code as one of this process: like any shell, the lowest eight bits.
fn exit_code(code: i32) -> u8 {
    (code & 0xff) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_docker_exec() {
        assert_eq!(exit_code(0), 0);
        assert_eq!(exit_code(3), 3);
        assert_eq!(exit_code(137), 137);
        assert_eq!(exit_code(-1), 255);
        assert_eq!(failure_code("program_not_found"), 127);
        assert_eq!(failure_code("program_not_executable"), 126);
        assert_eq!(failure_code("guest_unreachable"), 125);
    }

    #[test]
    fn only_a_refusal_about_the_program_has_a_code() {
        let api = |error_code: &str| {
            let error_code = error_code.to_owned();
            let problem = super::super::client::Problem {
                status: 422,
                error_code,
                message: "no".into(),
                ..Default::default()
            };
            ClientError::Api(problem)
        };
        assert_eq!(refused(api("program_not_found")).unwrap(), 127);
        assert!(refused(api("sandbox_not_found")).is_err());
    }
}
