//! `rethaw pause` and `rethaw resume`: to disk with the memory freed, and back with the same
//! processes.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use hyper::Method;
use serde_json::{Value, json};

use super::client::{ClientError, SLOW};
use super::{Context, human, many, output, sandbox};

/// Flags of `rethaw pause`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw pause 3kx
  rethaw pause $(rethaw ls -q --state running)

Related: resume, fork, ls.")]
pub struct PauseArgs {
    /// Sandboxes: ids, beginnings of ids, or names
    #[arg(value_name = "SANDBOX", required = true)]
    pub sandboxes: Vec<String>,
}

/// Flags of `rethaw resume`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw resume 3kx
  rethaw resume web --timeout 1h

Related: pause, fork, ls.")]
pub struct ResumeArgs {
    /// Sandboxes: ids, beginnings of ids, or names
    #[arg(value_name = "SANDBOX", required = true)]
    pub sandboxes: Vec<String>,

    /// Life time from now on: 90, 90s, 5m, 2h [default: the service's]
    #[arg(long, value_name = "TIME", value_parser = human::parse_duration)]
    pub timeout: Option<Duration>,
}

/// Pauses.
pub async fn pause(cx: &Context, args: &PauseArgs) -> anyhow::Result<ExitCode> {
    change(cx, &args.sandboxes, "pause", "paused", &json!({})).await
}

/// Resumes.
pub async fn resume(cx: &Context, args: &ResumeArgs) -> anyhow::Result<ExitCode> {
    let mut body = json!({});
    if let Some(timeout) = args.timeout {
        body["timeout_seconds"] = human::whole_seconds(timeout).into();
    }
    change(cx, &args.sandboxes, "resume", "resumed", &body).await
}

async fn change(
    cx: &Context,
    names: &[String],
    action: &str,
    done: &str,
    body: &Value,
) -> anyhow::Result<ExitCode> {
    let ids = sandbox::resolve_all(&cx.client, names).await?;
    let mut report = many::Report::new(cx.json);
    for id in &ids {
        let path = format!("/v1/sandboxes/{id}/{action}");
        let start = Instant::now();
        let result = post(cx, &path, body).await;
        let took = human::millis(start.elapsed().as_secs_f64() * 1000.0);
        report.add(id, result, &format!("{id} {done} in {took}"))?;
    }
    report.finish(output::json)
}

/// The reply's JSON, or the id alone where the reply has no body.
async fn post(cx: &Context, path: &str, body: &Value) -> Result<Value, ClientError> {
    let response = cx.client.send_json(Method::POST, path, Some(body), SLOW).await?;
    let bytes = cx.client.collect(response).await?;
    if bytes.is_empty() {
        return Ok(json!({}));
    }
    serde_json::from_slice(&bytes).map_err(|e| cx.client.unexpected(&e.to_string()))
}
