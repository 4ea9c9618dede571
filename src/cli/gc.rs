//! `rethaw gc`: removes what no template and no sandbox needs.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::SLOW;
use super::table::Table;
use super::{Context, human, output};

/// Flags of `rethaw gc`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw gc --dry-run
  rethaw gc
  rethaw gc --older-than 7d

Snapshots that nothing stands on, uploads that no build copies, guest images that nothing boots from,
network rules and switches on the host of services that are no more.
Related: template.")]
pub struct GcArgs {
    /// Only say what would go
    #[arg(short = 'n', long)]
    pub dry_run: bool,

    /// Leave what is younger
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = human::parse_duration)]
    pub older_than: Duration,
}

#[derive(Debug, Deserialize)]
struct Found {
    items: Vec<Garbage>,
    bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Garbage {
    kind: String,
    id: String,
    bytes: u64,
    reason: String,
}

/// Collects.
pub async fn run(cx: &Context, args: &GcArgs) -> anyhow::Result<ExitCode> {
    let age = human::whole_seconds(args.older_than);
    let body = json!({ "dry_run": args.dry_run, "older_than_seconds": age });
    let value: Value = cx.client.json(Method::POST, "/v1/gc", Some(&body), SLOW).await?;
    if cx.json {
        output::json(&value)?;
        return Ok(ExitCode::SUCCESS);
    }
    let found: Found =
        serde_json::from_value(value).map_err(|e| cx.client.unexpected(&e.to_string()))?;
    let mut table = Table::new(&["KIND", "ID", "ON DISK", "REASON"]);
    for garbage in found.items {
        let bytes = human::bytes(garbage.bytes);
        table.row(vec![garbage.kind, garbage.id, bytes, garbage.reason]);
    }
    output::write(table.to_string().as_bytes())?;
    let verb = if args.dry_run { "would be freed" } else { "freed" };
    output::note(&format!("{} {verb}", human::bytes(found.bytes)));
    Ok(ExitCode::SUCCESS)
}
