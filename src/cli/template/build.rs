//! `rethaw template build`: uploads what it copies, asks for a template, and shows what its build
//! says until it is ready.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::client::{ClientError, Next, QUICK, SLOW, empty, full, segment};
use super::super::{Context, human, output};
use super::Template;
use super::copy::Archive;
use super::steps::{self, StepFile, Steps};

/// Flags of `rethaw template build`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw template build py312 --run 'apt-get install -y python3-numpy'
  rethaw template build web --from py312 --copy ./app:/srv/app --run 'systemctl enable --now app'
  rethaw template build api --start 'python3 -m http.server' --wait-port 8000
  rethaw template build ci -f template.toml --no-wait

Steps run in the order they are given in, those of the file first.")]
pub struct BuildArgs {
    /// Name of the new template
    #[arg(value_name = "NAME")]
    pub name: String,

    /// Template to start from [default: base]
    #[arg(long, value_name = "NAME")]
    pub from: Option<String>,

    /// TOML or JSON file with `from` and `steps`
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,

    #[command(flatten)]
    pub steps: Steps,

    /// Do not stay until it is ready
    #[arg(long)]
    pub no_wait: bool,

    /// Longest stay; the build goes on when it is over
    #[arg(long, value_name = "TIME", default_value = "30m", value_parser = human::parse_duration)]
    pub wait: Duration,
}

/// Builds.
pub async fn run(cx: &Context, args: &BuildArgs) -> anyhow::Result<ExitCode> {
    let file = args.file.as_deref().map(StepFile::read).transpose()?.unwrap_or_default();
    let from = args.from.clone().or_else(|| file.from.clone()).unwrap_or_else(|| "base".to_owned());
    let (steps, archives) = steps::all(file, &args.steps)?;
    let body = json!({ "name": args.name, "from": from, "steps": steps });
    let start = Instant::now();
    for archive in archives {
        upload(cx, archive).await?;
    }
    let mut value: Value =
        cx.client.json(Method::POST, "/v1/templates", Some(&body), QUICK).await?;
    if !args.no_wait {
        value = follow(cx, &args.name, value, start, args.wait).await?;
    }
    if cx.json {
        output::json(&value)?;
    } else {
        let template = parse(cx, &value)?;
        let took = human::duration(start.elapsed());
        output::line(&match template.snapshot {
            Some(snapshot) => format!(
                "template {} is ready after {took}{}: snapshot {}, {} on disk",
                args.name,
                if template.cached { ", as it was built before" } else { "" },
                snapshot.id,
                human::bytes(snapshot.allocated_bytes)
            ),
            None => format!("template {} is {}", args.name, template.state),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Sends an archive that the service does not have yet.
async fn upload(cx: &Context, archive: Archive) -> anyhow::Result<()> {
    let path = format!("/v1/inputs/{}", archive.sha256);
    match cx.client.get::<Value>(&path).await {
        Ok(_) => return Ok(()),
        Err(ClientError::Api(problem)) if problem.status == 404 => {}
        Err(e) => return Err(e.into()),
    }
    let request = cx.client.request(Method::PUT, &path).body(full(archive.bytes));
    let request = request.map_err(|e| cx.client.bad_request(&e))?;
    cx.client.send(request, SLOW).await?;
    Ok(())
}

/// Shows what the build says until it has ended, and gives the template then.
async fn follow(
    cx: &Context,
    name: &str,
    value: Value,
    start: Instant,
    limit: Duration,
) -> anyhow::Result<Value> {
    let path = format!("/v1/templates/{}", segment(name));
    let mut value = value;
    if !parse(cx, &value)?.is_final() {
        show_log(cx, name, &format!("{path}/log?follow=true"), start, limit).await?;
        value = cx.client.get(&path).await?;
    }
    let template = parse(cx, &value)?;
    match template.state.as_str() {
        "ready" => Ok(value),
        "failed" => {
            let reason = template.error.unwrap_or(template.message);
            anyhow::bail!("template {name} failed: {reason}");
        }
        state => anyhow::bail!("the log of template {name} ended while it is {state}"),
    }
}

/// A line of the log; the service may send more.
#[derive(Debug, Deserialize)]
struct Line {
    kind: String,
    #[serde(default)]
    text: String,
}

async fn show_log(
    cx: &Context,
    name: &str,
    path: &str,
    start: Instant,
    limit: Duration,
) -> anyhow::Result<()> {
    let request = cx.client.request(Method::GET, path).body(empty());
    let request = request.map_err(|e| cx.client.bad_request(&e))?;
    let mut frames = cx.client.frames(cx.client.send(request, QUICK).await?);
    let mut progress = Progress::new();
    let mut buffer = Vec::new();
    loop {
        let left = limit.saturating_sub(start.elapsed());
        match frames.next_within(left).await? {
            Next::Bytes(bytes) => buffer.extend_from_slice(&bytes),
            Next::End => return Ok(()),
            Next::Silence => anyhow::bail!(
                "template {name} is not ready after {}; `rethaw template ls` shows how it goes on",
                human::duration(limit)
            ),
        }
        while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let line: Line =
                serde_json::from_slice(&line).map_err(|e| cx.client.unexpected(&e.to_string()))?;
            match line.kind.as_str() {
                "stdout" | "stderr" => progress.pass(&line.text)?,
                // What it says comes with the template, too.
                "end" => {}
                _ => progress.show(&line.text),
            }
        }
    }
}

fn parse(cx: &Context, value: &Value) -> anyhow::Result<Template> {
    let parsed = serde_json::from_value(value.clone());
    parsed.map_err(|e| cx.client.unexpected(&format!("template: {e}")).into())
}

/// A spinner on a terminal; elsewhere a line whenever something new is to be said. What steps print
/// goes through as it is.
struct Progress {
    bar: ProgressBar,
    at_line_start: bool,
}

impl Progress {
    fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        // A constant; a slip in it would show as the default style.
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}  {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar, at_line_start: true }
    }

    fn show(&mut self, text: &str) {
        if self.bar.is_hidden() {
            let _ = self.end_line();
            output::note(text);
        } else {
            self.bar.set_message(text.to_owned());
        }
    }

    fn pass(&mut self, text: &str) -> anyhow::Result<()> {
        self.at_line_start = text.ends_with('\n');
        self.bar.suspend(|| output::write_error(text.as_bytes()))
    }

    fn end_line(&mut self) -> anyhow::Result<()> {
        if self.at_line_start {
            return Ok(());
        }
        self.at_line_start = true;
        output::write_error(b"\n")
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        let _ = self.end_line();
    }
}
