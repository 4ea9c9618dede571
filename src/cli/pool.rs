//! `rethaw pool`: how many VMs wait, and how many should.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{QUICK, segment};
use super::table::Table;
use super::{Context, output, sandbox};

/// Subcommands of `rethaw pool`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw pool ls
  rethaw pool set base 16
  rethaw pool set py312 0

Related: template, ls.")]
pub struct PoolArgs {
    #[command(subcommand)]
    command: PoolCommand,
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Show the pools
    Ls,
    /// Change how many VMs a pool keeps ready
    Set {
        /// Template of the pool
        template: String,
        /// VMs to keep ready; 0 empties the pool
        target: u32,
    },
}

/// A pool's numbers.
#[derive(Debug, Deserialize)]
struct Pool {
    template: String,
    target: u32,
    ready: u32,
    #[serde(default)]
    restoring: u32,
    #[serde(default)]
    claimed: u32,
    #[serde(default)]
    misses_total: u64,
}

/// Runs a subcommand.
pub async fn run(cx: &Context, args: &PoolArgs) -> anyhow::Result<ExitCode> {
    let values = match &args.command {
        PoolCommand::Ls => {
            let values = sandbox::list_values(&cx.client, "/v1/pools").await?;
            if cx.json {
                output::json(&json!({ "items": values }))?;
                return Ok(ExitCode::SUCCESS);
            }
            values
        }
        PoolCommand::Set { template, target } => {
            let path = format!("/v1/pools/{}", segment(template));
            let body = json!({ "target": target });
            let pool: Value = cx.client.json(Method::PUT, &path, Some(&body), QUICK).await?;
            if cx.json {
                output::json(&pool)?;
                return Ok(ExitCode::SUCCESS);
            }
            vec![pool]
        }
    };
    let mut table = Table::new(&["TEMPLATE", "READY", "TARGET", "RESTORING", "CLAIMED", "MISSES"]);
    for value in values {
        let pool: Pool =
            serde_json::from_value(value).map_err(|e| cx.client.unexpected(&e.to_string()))?;
        table.row(vec![
            pool.template,
            pool.ready.to_string(),
            pool.target.to_string(),
            pool.restoring.to_string(),
            pool.claimed.to_string(),
            pool.misses_total.to_string(),
        ]);
    }
    output::write(table.to_string().as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
