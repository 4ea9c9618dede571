//! `rethaw fork`: clones of a running sandbox, each with an identity of its own.

use std::process::ExitCode;

use clap::Args;
use hyper::Method;
use serde_json::{Value, json};

use super::client::SLOW;
use super::{Context, output, sandbox};

/// Flags of `rethaw fork`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw fork 3kx
  rethaw fork web --count 10
  for id in $(rethaw fork 3kx -c 3); do rethaw exec $id -- ./try; done

Prints the ids of the clones. Related: pause, resume, exec.")]
pub struct ForkArgs {
    /// Sandbox: id, the beginning of one, or a name
    #[arg(value_name = "SANDBOX")]
    pub sandbox: String,

    /// How many clones
    #[arg(short, long, default_value_t = 1, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub count: u32,
}

/// Forks.
pub async fn run(cx: &Context, args: &ForkArgs) -> anyhow::Result<ExitCode> {
    let id = sandbox::resolve(&cx.client, &args.sandbox).await?;
    let path = format!("/v1/sandboxes/{id}/fork");
    let body = json!({ "count": args.count });
    let reply: Value = cx.client.json(Method::POST, &path, Some(&body), SLOW).await?;
    let Some(items) = reply["items"].as_array() else {
        return Err(cx.client.unexpected("fork: no items").into());
    };
    let mut failed = 0;
    for item in items {
        // Some clones may have come about and others not.
        match item["id"].as_str() {
            Some(id) if !cx.json => output::line(id)?,
            Some(_) => {}
            None => {
                failed += 1;
                let message = item["error"]["message"].as_str().unwrap_or("no reason was given");
                output::note(&format!("a clone of {id} failed: {message}"));
            }
        }
    }
    if cx.json {
        output::json(&reply)?;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
