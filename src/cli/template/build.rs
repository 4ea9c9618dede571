//! `rethaw template build`: asks for a template and stays with it until it is ready.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::super::client::{QUICK, segment};
use super::super::{Context, human, output};
use super::Template;
use super::steps::{self, StepFile, Steps};

/// How often progress is asked for.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// Flags of `rethaw template build`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw template build py312 --run 'apt-get install -y python3-numpy'
  rethaw template build web --from py312 --copy ./app:/srv/app --run 'systemctl enable --now app'
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
    let body = json!({ "name": args.name, "from": from, "steps": steps::all(file, &args.steps)? });
    let start = Instant::now();
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
                "template {} is ready after {took}: snapshot {}, {} on disk",
                args.name,
                snapshot.id,
                human::bytes(snapshot.allocated_bytes)
            ),
            None => format!("template {} is {}", args.name, template.state),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows progress until the template is ready.
async fn follow(
    cx: &Context,
    name: &str,
    mut value: Value,
    start: Instant,
    limit: Duration,
) -> anyhow::Result<Value> {
    let mut progress = Progress::new();
    let path = format!("/v1/templates/{}", segment(name));
    loop {
        let template = parse(cx, &value)?;
        match template.state.as_str() {
            "ready" => return Ok(value),
            "failed" => {
                let reason = template.error.unwrap_or(template.message);
                anyhow::bail!("template {name} failed: {reason}");
            }
            state => progress.show(state, &template.message),
        }
        if start.elapsed() > limit {
            anyhow::bail!(
                "template {name} is still {} after {}; `rethaw template ls` shows how it goes on",
                template.state,
                human::duration(limit)
            );
        }
        tokio::time::sleep(ASK_EVERY).await;
        value = cx.client.get(&path).await?;
    }
}

fn parse(cx: &Context, value: &Value) -> anyhow::Result<Template> {
    let parsed = serde_json::from_value(value.clone());
    parsed.map_err(|e| cx.client.unexpected(&format!("template: {e}")).into())
}

/// A spinner on a terminal; elsewhere a line whenever something new is to be said.
struct Progress {
    bar: ProgressBar,
    said: String,
}

impl Progress {
    fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        // A constant; a slip in it would show as the default style.
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}  {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar, said: String::new() }
    }

    fn show(&mut self, state: &str, message: &str) {
        let text =
            if message.is_empty() { state.to_owned() } else { format!("{state}: {message}") };
        if text == self.said {
            return;
        }
        if self.bar.is_hidden() {
            output::note(&text);
        } else {
            self.bar.set_message(text.clone());
        }
        self.said = text;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
