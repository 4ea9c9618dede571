//! `rethaw run`: a sandbox for one command, gone when the command is done.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use hyper::Method;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::client::{ClientError, SLOW};
use super::exec::CommandArgs;
use super::sandbox::Sandbox;
use super::{Context, env, human, output, remote};

/// Flags of `rethaw run`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw run -- python3 -c 'print(6 * 7)'
  rethaw run --template py312 -e TOKEN --timeout 10m -- ./job.sh
  echo 'print(1)' | rethaw run python3 -
  id=$(rethaw run --detach --name web)
  rethaw run --internet off -- ./untrusted.sh
  rethaw run --allow pypi.org --allow '*.pythonhosted.org' -- pip install requests

Exit code: as of `rethaw exec`. Related: exec, ls, rm, shell.")]
pub struct RunArgs {
    /// Template to make it from
    #[arg(short, long, default_value = "base", value_name = "NAME")]
    pub template: String,

    /// Life time of the sandbox: 90, 90s, 5m, 2h [default: the service's]
    #[arg(long, value_name = "TIME", value_parser = human::parse_duration)]
    pub timeout: Option<Duration>,

    /// What happens when its time is up
    #[arg(long, value_enum, default_value_t = OnTimeout::Kill)]
    pub on_timeout: OnTimeout,

    /// Name to use in place of its id
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Label to keep with it
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = env::parse_pair)]
    pub labels: Vec<(String, String)>,

    /// What it may reach: everything but the host, or nothing [default: on]
    #[arg(long, value_enum, value_name = "ON|OFF", conflicts_with = "allow")]
    pub internet: Option<InternetChoice>,

    /// Let it reach only this address, network, host name or *.name; may be given several times
    #[arg(long, value_name = "DEST")]
    pub allow: Vec<String>,

    /// Let anybody reach this port of it through the service; may be given several times
    #[arg(long = "public-port", value_name = "PORT")]
    pub public_ports: Vec<u16>,

    /// Remove it when the command has ended (the default)
    #[arg(long, conflicts_with_all = ["keep", "detach"])]
    pub rm: bool,

    /// Leave it running when the command has ended
    #[arg(long)]
    pub keep: bool,

    /// Only make it and print its id; it stays
    #[arg(short, long, conflicts_with_all = ["argv", "shell"])]
    pub detach: bool,

    /// Say on standard error how long each part took
    #[arg(long)]
    pub timings: bool,

    #[command(flatten)]
    pub options: CommandArgs,

    /// Command and arguments
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        required_unless_present_any = ["shell", "detach"],
        conflicts_with = "shell"
    )]
    pub argv: Vec<String>,
}

/// What happens to a sandbox whose time is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It is removed
    Kill,
    /// It is paused
    Pause,
}

/// Whether a sandbox reaches anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum InternetChoice {
    /// Everything but what no sandbox may
    On,
    /// Nothing
    Off,
}

#[derive(Debug, Serialize)]
struct CreateBody {
    template: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_seconds: Option<u64>,
    metadata: BTreeMap<String, String>,
    env: BTreeMap<String, String>,
    on_timeout: OnTimeout,
    #[serde(skip_serializing_if = "Option::is_none")]
    internet: Option<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    public_ports: Vec<u16>,
}

/// Makes the sandbox, runs the command, removes the sandbox.
pub async fn run(cx: &Context, args: &RunArgs) -> anyhow::Result<ExitCode> {
    let body = create_body(args)?;
    let mut command = args.options.command(&args.argv, None)?;
    // The sandbox has them for every command already.
    command.env.clear();
    let input = if args.detach { super::stdin::Input::None } else { args.options.input().await? };

    let start = Instant::now();
    // From here on a signal must not leave a sandbox behind.
    let stop = stop_signal()?;
    tokio::pin!(stop);
    let created = create(cx, &body);
    tokio::pin!(created);
    let (value, stopped) = tokio::select! {
        created = &mut created => (created?, None),
        // The reply holds the id, without which nothing can be removed.
        code = &mut stop => (created.await?, Some(code)),
    };
    let sandbox: Sandbox = serde_json::from_value(value.clone())
        .map_err(|e| cx.client.unexpected(&format!("sandbox: {e}")))?;
    let ready_after = start.elapsed();
    if args.detach && stopped.is_none() {
        if cx.json {
            output::json(&value)?;
        } else {
            output::line(&sandbox.id)?;
        }
        return Ok(ExitCode::SUCCESS);
    }

    let work = async {
        if cx.json {
            let (reply, code) = remote::buffered(&cx.client, &sandbox.id, command, input).await?;
            return Ok::<_, anyhow::Error>((code, reply, None));
        }
        let ending = remote::stream(&cx.client, &sandbox.id, command, input).await?;
        Ok((ending.code, None, ending.first_output))
    };
    let done = match stopped {
        Some(code) => Ok((code, None, None)),
        None => tokio::select! {
            done = work => done,
            code = &mut stop => Ok((code, None, None)),
        },
    };
    if args.keep {
        output::note(&format!("sandbox {} is kept; remove it with `rethaw rm`", sandbox.id));
    } else {
        remove(cx, &sandbox.id).await;
    }
    let (code, reply, first_output) = done?;
    if let Some(reply) = reply {
        output::json(&json!({ "sandbox": value, "result": reply }))?;
    }
    if args.timings {
        report(&sandbox, ready_after, first_output);
    }
    Ok(code.into())
}

fn create_body(args: &RunArgs) -> anyhow::Result<CreateBody> {
    let mut metadata: BTreeMap<_, _> = args.labels.iter().cloned().collect();
    if let Some(name) = &args.name {
        metadata.insert("name".to_owned(), name.clone());
    }
    Ok(CreateBody {
        template: args.template.clone(),
        timeout_seconds: args.timeout.map(human::whole_seconds),
        metadata,
        env: env::collect(&args.options.env)?,
        on_timeout: args.on_timeout,
        internet: match args.internet {
            _ if !args.allow.is_empty() => Some(json!({ "allow": args.allow })),
            Some(InternetChoice::On) => Some(json!("on")),
            Some(InternetChoice::Off) => Some(json!("off")),
            None => None,
        },
        public_ports: args.public_ports.clone(),
    })
}

async fn create(cx: &Context, body: &CreateBody) -> Result<Value, ClientError> {
    cx.client.json(Method::POST, "/v1/sandboxes", Some(body), SLOW).await
}

/// Removes a sandbox; failing to is worth a word, not a change of the exit code.
pub(super) async fn remove(cx: &Context, id: &str) {
    let path = format!("/v1/sandboxes/{id}");
    match cx.client.send_json(Method::DELETE, &path, None::<&Value>, SLOW).await {
        Ok(_) => {}
        // Its time was up, or somebody was faster.
        Err(e) if e.error_code() == Some("sandbox_not_found") => {}
        Err(e) => output::note(&format!("sandbox {id} may still be there: {e}")),
    }
}

/// Waits for a signal that asks this process to end; gives the exit code for it.
///
/// The signals are caught from this call on, not from the first wait.
pub(super) fn stop_signal() -> std::io::Result<impl Future<Output = u8>> {
    let mut int = signal(SignalKind::interrupt())?;
    let mut term = signal(SignalKind::terminate())?;
    let mut hup = signal(SignalKind::hangup())?;
    Ok(async move {
        let number = tokio::select! {
            _ = int.recv() => SignalKind::interrupt(),
            _ = term.recv() => SignalKind::terminate(),
            _ = hup.recv() => SignalKind::hangup(),
        };
        128 + number.as_raw_value() as u8
    })
}

fn report(sandbox: &Sandbox, ready: Duration, first_output: Option<Duration>) {
    let ms = |span: Duration| human::millis(span.as_secs_f64() * 1000.0);
    output::note(&format!("sandbox {} ({}) in {}", sandbox.id, sandbox.origin, ms(ready)));
    for (phase, took) in &sandbox.timings_ms {
        output::note(&format!("  {phase} {}", human::millis(*took)));
    }
    if let Some(first) = first_output {
        output::note(&format!("first output {} after the command was sent", ms(first)));
    }
}
