//! `rethaw rm`: sandboxes and everything in them, gone.

use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;

use clap::Args;
use hyper::Method;
use serde_json::{Value, json};

use super::client::SLOW;
use super::{Context, many, output, sandbox};

/// Flags of `rethaw rm`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw rm 3kx web
  rethaw rm $(rethaw ls -q --state paused)
  rethaw rm --all --force

Related: ls, run, pause.")]
pub struct RmArgs {
    /// Sandboxes: ids, beginnings of ids, or names
    #[arg(value_name = "SANDBOX", required_unless_present = "all")]
    pub sandboxes: Vec<String>,

    /// All sandboxes
    #[arg(long, conflicts_with = "sandboxes")]
    pub all: bool,

    /// Do not ask, and do not mind those that are gone already
    #[arg(short, long)]
    pub force: bool,
}

/// Removes.
pub async fn run(cx: &Context, args: &RmArgs) -> anyhow::Result<ExitCode> {
    let ids = if args.all {
        let ids: Vec<String> =
            sandbox::list(&cx.client).await?.into_iter().map(|one| one.id).collect();
        if !ids.is_empty() && !args.force && !confirmed(ids.len())? {
            return Ok(ExitCode::FAILURE);
        }
        ids
    } else {
        sandbox::resolve_all(&cx.client, &args.sandboxes).await?
    };
    let mut report = many::Report::new(cx.json);
    for id in &ids {
        let path = format!("/v1/sandboxes/{id}");
        let sent = cx.client.send_json(Method::DELETE, &path, None::<&Value>, SLOW).await;
        let result = match sent {
            Ok(_) => Ok(json!({ "status": "removed" })),
            // Between looking and removing, a sandbox's time may be up.
            Err(e) if (args.force || args.all) && e.error_code() == Some("sandbox_not_found") => {
                Ok(json!({ "status": "already_gone" }))
            }
            Err(e) => Err(e),
        };
        report.add(id, result, id)?;
    }
    report.finish(output::json)
}

/// Asks whoever is at the terminal; without one, `--force` is the only way.
fn confirmed(count: usize) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        anyhow::bail!("rm --all would remove {count} sandboxes; add --force to mean it");
    }
    let mut err = std::io::stderr().lock();
    write!(err, "Remove {count} sandboxes and everything in them? [y/N] ")?;
    err.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
