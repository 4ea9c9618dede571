//! `rethaw key`: API keys besides that of the key file.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{QUICK, segment};
use super::table::Table;
use super::{Context, many, output, sandbox};
use crate::engine::keys::{Quotas, Scope};

/// Subcommands of `rethaw key`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw key create ci --max-sandboxes 20 --claims-per-second 5
  rethaw key create ops --scope all_sandboxes --scope pools
  rethaw key ls
  rethaw key rm ci

A key is shown once, when it is made: on standard output, alone. It goes into RETHAW_API_KEY.")]
pub struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a key and print it
    Create(Box<CreateArgs>),
    /// List keys
    Ls {
        /// Print ids only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Remove keys; their sandboxes stay
    Rm {
        /// Keys: ids or names
        #[arg(value_name = "KEY", required = true)]
        keys: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// What to call it
    name: String,

    /// What it may do; may be given several times [default: sandboxes]
    #[arg(long = "scope", value_name = "SCOPE", value_enum)]
    scopes: Vec<Scope>,

    /// Sandboxes at a time, paused ones included
    #[arg(long, value_name = "N")]
    max_sandboxes: Option<u32>,

    /// Processors at a time
    #[arg(long, value_name = "N")]
    max_vcpus: Option<u32>,

    /// Memory at a time, in MiB
    #[arg(long, value_name = "MIB")]
    max_memory_mib: Option<u64>,

    /// What disks can grow to, in MiB
    #[arg(long, value_name = "MIB")]
    max_disk_mib: Option<u64>,

    /// Sandboxes made in a second
    #[arg(long, value_name = "RATE")]
    claims_per_second: Option<f64>,
}

impl CreateArgs {
    fn body(&self) -> Value {
        let bytes = |mib: Option<u64>| mib.map(|mib| mib.saturating_mul(1 << 20));
        let quotas = Quotas {
            sandboxes: self.max_sandboxes,
            vcpus: self.max_vcpus,
            memory_bytes: bytes(self.max_memory_mib),
            disk_bytes: bytes(self.max_disk_mib),
            claims_per_second: self.claims_per_second,
        };
        let mut body = json!({ "name": self.name, "quotas": quotas });
        if !self.scopes.is_empty() {
            body["scopes"] = json!(self.scopes);
        }
        body
    }
}

#[derive(Debug, Deserialize)]
struct Key {
    id: String,
    name: String,
    scopes: Vec<String>,
    #[serde(default)]
    quotas: Value,
    created_at: String,
    #[serde(default)]
    key: String,
}

/// Runs a subcommand.
pub async fn run(cx: &Context, args: &KeyArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        KeyCommand::Create(args) => create(cx, args).await,
        KeyCommand::Ls { quiet } => list(cx, *quiet).await,
        KeyCommand::Rm { keys } => remove(cx, keys).await,
    }
}

async fn create(cx: &Context, args: &CreateArgs) -> anyhow::Result<ExitCode> {
    let made: Value = cx.client.json(Method::POST, "/v1/keys", Some(&args.body()), QUICK).await?;
    if cx.json {
        output::json(&made)?;
        return Ok(ExitCode::SUCCESS);
    }
    let key: Key =
        serde_json::from_value(made).map_err(|e| cx.client.unexpected(&e.to_string()))?;
    output::line(&key.key)?;
    output::note(&format!("made key {} ({}); it is not shown again", key.name, key.id));
    Ok(ExitCode::SUCCESS)
}

async fn list(cx: &Context, quiet: bool) -> anyhow::Result<ExitCode> {
    let values = sandbox::list_values(&cx.client, "/v1/keys").await?;
    if cx.json {
        output::json(&json!({ "items": values }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["ID", "NAME", "SCOPES", "QUOTAS", "CREATED"]);
    for value in values {
        let key: Key =
            serde_json::from_value(value).map_err(|e| cx.client.unexpected(&e.to_string()))?;
        if quiet {
            output::line(&key.id)?;
            continue;
        }
        let quotas = key.quotas.as_object().into_iter().flatten();
        let quotas: Vec<String> = quotas.map(|(name, value)| format!("{name}={value}")).collect();
        let (scopes, quotas) = (key.scopes.join(","), quotas.join(","));
        table.row(vec![key.id, key.name, scopes, quotas, key.created_at]);
    }
    if !quiet {
        output::write(table.to_string().as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn remove(cx: &Context, wanted: &[String]) -> anyhow::Result<ExitCode> {
    let all = sandbox::list_values(&cx.client, "/v1/keys").await?;
    let mut report = many::Report::new(cx.json);
    for name in wanted {
        let found = all.iter().find(|key| key["id"] == *name || key["name"] == *name);
        // One that is not in the list is for the service to refuse.
        let id = found.and_then(|key| key["id"].as_str()).unwrap_or(name);
        let path = format!("/v1/keys/{}", segment(id));
        let sent = cx.client.send_json(Method::DELETE, &path, None::<&Value>, QUICK).await;
        report.add(id, sent.map(|_| json!({ "status": "removed" })), name)?;
    }
    report.finish(output::json)
}
