//! `rethaw template`: what sandboxes are made from.

mod build;
mod copy;
pub(super) mod steps;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::client::{SLOW, segment};
use super::table::Table;
use super::{Context, human, many, output, sandbox};

/// Subcommands of `rethaw template`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw template ls
  rethaw template build app --copy ./app:/srv/app --run 'python3 -m compileall /srv/app'
  rethaw template rm py312

Related: pool, run, gc.")]
pub struct TemplateArgs {
    #[command(subcommand)]
    command: TemplateCommand,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// Make a template: run steps in a VM, then freeze it
    Build(build::BuildArgs),
    /// List templates
    Ls {
        /// Print names only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Remove templates
    Rm {
        /// Their names
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
}

/// The fields of a template that are shown; the API may send more.
#[derive(Debug, Deserialize)]
struct Template {
    name: String,
    state: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    from: String,
    #[serde(default)]
    cached: bool,
    #[serde(default)]
    last_used_at: Option<String>,
    #[serde(default)]
    created_at: String,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    snapshot: Option<Snapshot>,
}

#[derive(Debug, Deserialize)]
struct Snapshot {
    id: String,
    #[serde(default)]
    memory_bytes: u64,
    #[serde(default)]
    allocated_bytes: u64,
}

impl Template {
    fn is_final(&self) -> bool {
        matches!(self.state.as_str(), "ready" | "failed")
    }
}

/// Runs a subcommand.
pub async fn run(cx: &Context, args: &TemplateArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        TemplateCommand::Build(args) => build::run(cx, args).await,
        TemplateCommand::Ls { quiet } => list(cx, *quiet).await,
        TemplateCommand::Rm { names } => remove(cx, names).await,
    }
}

async fn list(cx: &Context, quiet: bool) -> anyhow::Result<ExitCode> {
    let values = sandbox::list_values(&cx.client, "/v1/templates").await?;
    if cx.json && !quiet {
        output::json(&json!({ "items": values }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let columns = ["NAME", "STATE", "FROM", "MEMORY", "ON DISK", "AGE", "USED", "MESSAGE"];
    let mut table = Table::new(&columns);
    let mut names = String::new();
    let now = OffsetDateTime::now_utc();
    for value in values {
        let template: Template =
            serde_json::from_value(value).map_err(|e| cx.client.unexpected(&e.to_string()))?;
        names.push_str(&template.name);
        names.push('\n');
        let snapshot = template.snapshot.as_ref();
        let size =
            |of: fn(&Snapshot) -> u64| snapshot.map(|s| human::bytes(of(s))).unwrap_or_default();
        table.row(vec![
            template.name,
            template.state,
            template.from,
            size(|s| s.memory_bytes),
            size(|s| s.allocated_bytes),
            human::since(&template.created_at, now),
            template.last_used_at.map(|at| human::since(&at, now)).unwrap_or_default(),
            template.error.unwrap_or(template.message),
        ]);
    }
    let text = if quiet { names } else { table.to_string() };
    output::write(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

async fn remove(cx: &Context, names: &[String]) -> anyhow::Result<ExitCode> {
    let mut report = many::Report::new(cx.json);
    for name in names {
        let path = format!("/v1/templates/{}", segment(name));
        let sent = cx.client.send_json(Method::DELETE, &path, None::<&Value>, SLOW).await;
        let result = sent.map(|_| json!({ "name": name, "status": "removed" }));
        report.add(name, result, name)?;
    }
    report.finish(output::json)
}
