//! `rethaw verify-identity`: makes clones of a template and shows that no two are the same machine.
//!
//! Every clone is looked into from inside by a command, which knows nothing of what the service
//! says about the clone, and the two accounts are compared as well. One clone after the other, each
//! removed before the next: 50 of them need no more memory than one.

mod look;
mod tally;

use std::process::ExitCode;

use clap::Args;
use hyper::Method;
use serde_json::{Value, json};

use super::client::SLOW;
use super::run::{remove, stop_signal};
use super::table::Table;
use super::{Context, human, output};
use tally::Tally;

/// A clone that is forgotten all the same does not stay.
const LIFE_SECONDS: u64 = 300;

/// Flags of `rethaw verify-identity`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw verify-identity base
  rethaw verify-identity py312 --clones 200 --json

Exit code 1 when anything repeats, is unproven, or is not what the service says it is.
Related: template, doctor.")]
pub struct VerifyIdentityArgs {
    /// Template to clone
    pub template: String,

    /// How many clones to make
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=10_000))]
    pub clones: u32,

    /// Largest error of a clone's clock that is let pass, in milliseconds
    #[arg(long, default_value_t = 100.0, value_name = "MS")]
    pub max_clock_error: f64,
}

/// Makes the clones and judges them.
pub async fn run(cx: &Context, args: &VerifyIdentityArgs) -> anyhow::Result<ExitCode> {
    // From here on a signal must not leave a sandbox behind.
    let stop = stop_signal()?;
    tokio::pin!(stop);
    let mut tally = Tally::default();
    for n in 1..=args.clones {
        let body = json!({ "template": args.template, "timeout_seconds": LIFE_SECONDS,
            "metadata": { "name": format!("verify-identity-{}-{n}", std::process::id()) } });
        let created = cx.client.json::<Value>(Method::POST, "/v1/sandboxes", Some(&body), SLOW);
        tokio::pin!(created);
        let (sandbox, stopped) = tokio::select! {
            created = &mut created => (created?, None),
            // The reply holds the id, without which nothing can be removed.
            code = &mut stop => (created.await?, Some(code)),
        };
        let id = sandbox["id"].as_str().unwrap_or_default().to_owned();
        let looked = match stopped {
            Some(code) => Err(code),
            None => tokio::select! {
                looked = look::into(cx, &id) => Ok(looked),
                code = &mut stop => Err(code),
            },
        };
        remove(cx, &id).await;
        match looked {
            Ok(looked) => tally.add(&sandbox, looked?),
            Err(code) => {
                output::note(&format!("stopped after {} of {} clones", n - 1, args.clones));
                return Ok(code.into());
            }
        }
    }
    let faults = tally.faults(args.max_clock_error);
    if cx.json {
        let mut report = tally.json();
        report["template"] = args.template.as_str().into();
        report["faults"] = json!(faults);
        report["ok"] = faults.is_empty().into();
        output::json(&report)?;
    } else {
        print(&tally)?;
        faults.iter().for_each(|fault| output::note(fault));
    }
    Ok(if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(tally: &Tally) -> anyhow::Result<()> {
    let mut table = Table::new(&["SEEN IN THE GUEST", "DISTINCT", "OF", "WORST"]);
    for (item, row) in tally.samples() {
        let worst = match row.most_alike() {
            1 => "all differ".to_owned(),
            n => format!("{n} alike"),
        };
        table.row(vec![item, row.distinct().to_string(), row.count().to_string(), worst]);
    }
    let worst = format!("{} off", human::millis(tally.clock_error_ms()));
    table.row(vec!["clock".to_owned(), "-".to_owned(), tally.clones().to_string(), worst]);
    output::write(table.to_string().as_bytes())?;
    output::line("")?;
    let mut table = Table::new(&["READ BACK BY THE AGENT", "VERIFIED", "OF", "WORST", "SKIPPED"]);
    for (item, row) in tally.proofs() {
        let worst = human::millis(row.worst_micros as f64 / 1000.0);
        let skipped = row.skipped.clone().unwrap_or_default();
        table.row(vec![item, row.verified.to_string(), row.of.to_string(), worst, skipped]);
    }
    output::write(table.to_string().as_bytes())
}
