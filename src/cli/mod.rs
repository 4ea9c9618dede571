//! The command line: one file per subcommand, all of them clients of the HTTP API but `serve`.
//!
//! Standard output carries results only; whatever rethaw itself has to say goes to standard error
//! with the prefix `rethaw: `. Exit codes: 0 done, 1 failed, 2 wrong usage; `exec` and `run` exit
//! with the remote command's code, and with 125 where others exit with 1 or 2.

pub mod completions;
pub mod home;
pub mod serve;
pub mod serve_file;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Keeps microVM sandboxes warm, and hands one out in about a millisecond.
#[derive(Debug, Parser)]
#[command(name = "rethaw", version, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags every subcommand takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The service's URL
    #[arg(long, global = true, help_heading = "Global options", env = "RETHAW_URL", default_value = "http://127.0.0.1:7070")]
    pub url: String,

    /// API key [default: the key file of the service, $RETHAW_HOME/api-key]
    #[arg(long, global = true, help_heading = "Global options", env = "RETHAW_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub api_key: Option<String>,

    /// Print JSON instead of text
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service
    Serve(serve::ServeArgs),
    /// Say what works on this host, and why the rest does not
    Doctor,
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Print the version
    Version,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // clap knows whether this is help (standard output, 0) or a mistake (standard error).
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
        }
    };
    match dispatch(cli) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("rethaw: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Serve(args) => {
            crate::serve::run(args.resolve()?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Doctor => crate::doctor::run(cli.global.json),
        Command::Completions(args) => completions::run(&args),
        Command::Version => {
            println!("rethaw {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
    }
}
