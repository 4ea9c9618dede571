//! `rethaw ls`: the sandboxes there are.

use std::process::ExitCode;

use clap::Args;
use time::OffsetDateTime;

use super::table::Table;
use super::{Context, human, output, sandbox};

/// Flags of `rethaw ls`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw ls
  rethaw ls --state paused
  rethaw rm $(rethaw ls -q --template base)
  rethaw ls --json | jq -r '.items[].identity.hostname'")]
pub struct LsArgs {
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,

    /// Only sandboxes in this state
    #[arg(long, value_name = "STATE")]
    pub state: Option<String>,

    /// Only sandboxes of this template
    #[arg(short, long, value_name = "NAME")]
    pub template: Option<String>,
}

/// Prints the list.
pub async fn run(cx: &Context, args: &LsArgs) -> anyhow::Result<ExitCode> {
    let mut values = sandbox::list_values(&cx.client, "/v1/sandboxes").await?;
    values.retain(|value| {
        let fits = |field: &str, wanted: &Option<String>| {
            wanted.as_ref().is_none_or(|wanted| value[field] == wanted.as_str())
        };
        fits("state", &args.state) && fits("template", &args.template)
    });
    if cx.json && !args.quiet {
        output::json(&serde_json::json!({ "items": values }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table =
        Table::new(&["ID", "NAME", "TEMPLATE", "STATE", "ORIGIN", "AGE", "EXPIRES", "VMM"]);
    let now = OffsetDateTime::now_utc();
    let mut ids = String::new();
    for value in values {
        let one: sandbox::Sandbox =
            serde_json::from_value(value).map_err(|e| cx.client.unexpected(&e.to_string()))?;
        ids.push_str(&one.id);
        ids.push('\n');
        table.row(vec![
            one.id,
            one.metadata.get("name").cloned().unwrap_or_default(),
            one.template,
            one.state,
            one.origin,
            human::since(&one.created_at, now),
            human::until(&one.expires_at, now),
            one.vmm,
        ]);
    }
    if args.quiet {
        output::write(ids.as_bytes())?;
    } else {
        output::write(table.to_string().as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}
