//! `rethaw exec`: a command in a sandbox that is there already.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::remote::{self, Command};
use super::stdin::{self, Input};
use super::{Context, env, human, output, sandbox};

/// Flags of `rethaw exec`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw exec 3kx -- uname -a
  rethaw exec web -e DEBUG=1 -w /srv python3 app.py
  rethaw exec 3kx --shell 'cd /tmp && ls | wc -l'
  tar c . | rethaw exec 3kx tar x -C /srv

Exit code: the command's own; 126 not executable, 127 not found, 128+n killed by signal n,
125 when rethaw itself failed. Standard input is passed on when it is a pipe or a file.")]
pub struct ExecArgs {
    /// Sandbox: id, the beginning of one, or a name
    #[arg(value_name = "SANDBOX")]
    pub sandbox: String,

    #[command(flatten)]
    pub options: CommandArgs,

    /// Kill the command after this time: 90, 90s, 5m, 2h
    #[arg(long, value_name = "TIME", value_parser = human::parse_duration)]
    pub timeout: Option<Duration>,

    /// Command and arguments
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        required_unless_present = "shell",
        conflicts_with = "shell"
    )]
    pub argv: Vec<String>,
}

/// Flags that `exec` and `run` share.
#[derive(Debug, Clone, Default, Args)]
pub struct CommandArgs {
    /// Run one string through /bin/sh -c instead of a command with arguments
    #[arg(long, value_name = "SCRIPT")]
    pub shell: Option<String>,

    /// Variable for the command; without a value, this process's own
    #[arg(short, long = "env", value_name = "NAME[=VALUE]", value_parser = env::parse)]
    pub env: Vec<env::Variable>,

    /// Folder to run it in
    #[arg(short = 'w', long, value_name = "DIR")]
    pub cwd: Option<String>,

    /// User to run it as
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,

    /// Do not read standard input
    #[arg(short = 'n', long)]
    pub no_stdin: bool,
}

impl CommandArgs {
    /// The command these flags and `argv` describe.
    pub fn command(&self, argv: &[String], limit: Option<Duration>) -> anyhow::Result<Command> {
        let argv = match &self.shell {
            Some(script) => vec!["/bin/sh".to_owned(), "-c".to_owned(), script.clone()],
            None => argv.to_vec(),
        };
        Ok(Command {
            argv,
            env: env::collect(&self.env)?,
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            timeout_seconds: limit.map(|limit| limit.as_secs_f64()),
            ..Command::default()
        })
    }

    /// Standard input for it.
    pub async fn input(&self) -> anyhow::Result<Input> {
        if self.no_stdin { Ok(Input::None) } else { stdin::read().await }
    }
}

/// Runs the command.
pub async fn run(cx: &Context, args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let command = args.options.command(&args.argv, args.timeout)?;
    let id = sandbox::resolve(&cx.client, &args.sandbox).await?;
    let input = args.options.input().await?;
    if cx.json {
        let (reply, code) = remote::buffered(&cx.client, &id, command, input).await?;
        if let Some(reply) = reply {
            output::json(&reply)?;
        }
        return Ok(code.into());
    }
    Ok(remote::stream(&cx.client, &id, command, input).await?.code.into())
}
