//! The command line: one file per subcommand, all of them clients of the HTTP API but `serve`.
//!
//! Standard output carries results only; whatever rethaw itself has to say goes to standard error
//! with the prefix `rethaw: `. Exit codes: 0 done, 1 failed, 2 wrong usage; `exec`, `run` and
//! `shell` exit with the remote command's code, and with 125 where others exit with 1 or 2.

mod client;
mod completions;
mod cp;
mod env;
mod exec;
mod fork;
mod gc;
pub mod home;
mod human;
mod key;
mod ls;
mod man;
mod many;
pub mod network;
mod output;
mod pool;
mod remote;
mod rm;
mod run;
mod sandbox;
pub mod serve;
mod serve_file;
mod serve_templates;
mod shell;
mod stdin;
mod table;
mod template;
mod top;
mod transition;
mod verify_identity;
mod version;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Keeps microVM sandboxes warm, and hands one out in about a millisecond.
#[derive(Debug, Parser)]
#[command(
    name = "rethaw",
    version,
    subcommand_required = true,
    max_term_width = 100,
    arg_required_else_help = true
)]
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
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        env = "RETHAW_URL",
        default_value = "http://127.0.0.1:7070"
    )]
    pub url: String,

    /// API key [default: the key file of the service, $RETHAW_HOME/api-key]
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        env = "RETHAW_API_KEY",
        hide_env_values = true,
        value_name = "KEY"
    )]
    pub api_key: Option<String>,

    /// Print JSON instead of text
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
}

/// What client subcommands work with.
#[derive(Debug)]
struct Context {
    client: client::Client,
    /// Print JSON.
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service
    Serve(serve::ServeArgs),
    /// Say what works on this host, and why the rest does not
    #[command(after_help = "Examples:
  rethaw doctor
  rethaw doctor --json

Exit code 1 when the service could not run here.")]
    Doctor,
    /// Run a command in a sandbox of its own
    Run(run::RunArgs),
    /// Run a command in a sandbox
    Exec(exec::ExecArgs),
    /// List sandboxes
    Ls(ls::LsArgs),
    /// Copy files into a sandbox or out of it
    Cp(cp::CpArgs),
    /// Open a terminal in a sandbox
    Shell(shell::ShellArgs),
    /// Put a sandbox to disk and free its memory
    Pause(transition::PauseArgs),
    /// Bring a paused sandbox back, with its processes
    Resume(transition::ResumeArgs),
    /// Clone a running sandbox
    Fork(fork::ForkArgs),
    /// Remove sandboxes
    Rm(rm::RmArgs),
    /// Make, list and remove templates
    Template(template::TemplateArgs),
    /// Remove what no template and no sandbox needs
    Gc(gc::GcArgs),
    /// Show and size the pools of warm VMs
    Pool(pool::PoolArgs),
    /// Watch sandboxes, pools and latencies
    Top(top::TopArgs),
    /// Make, list and remove API keys
    Key(key::KeyArgs),
    /// Show that no two clones of a template are the same machine
    VerifyIdentity(verify_identity::VerifyIdentityArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Print a manual page
    Man(man::ManArgs),
    /// Print the version of this program and of the service
    #[command(after_help = "Examples:
  rethaw version
  rethaw version --json")]
    Version,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // clap knows whether this is help (standard output, 0) or a mistake (standard error).
            let _ = e.print();
            let code = match e.exit_code() {
                0 => 0,
                _ if runs_a_command(std::env::args_os().skip(1)) => remote::OWN_FAILURE,
                other => other as u8,
            };
            return code.into();
        }
    };
    let failure = match cli.command {
        Command::Run(_) | Command::Exec(_) | Command::Shell(_) => remote::OWN_FAILURE,
        _ => 1,
    };
    match dispatch(cli) {
        Ok(code) => code,
        Err(e) if e.is::<output::OutputClosed>() => ExitCode::SUCCESS,
        Err(e) => {
            output::note(&format!("{e:#}"));
            failure.into()
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
        Command::Man(args) => man::run(&args),
        command => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let result = runtime.block_on(talk(&cli.global, command));
            // A thread may still be reading a standard input that never ends.
            runtime.shutdown_background();
            result
        }
    }
}

/// The subcommands that are clients of a service.
async fn talk(global: &Global, command: Command) -> anyhow::Result<ExitCode> {
    if let Command::Version = command {
        return version::run(global).await;
    }
    let cx = Context { client: client::Client::new(global)?, json: global.json };
    match &command {
        Command::Run(args) => run::run(&cx, args).await,
        Command::Exec(args) => exec::run(&cx, args).await,
        Command::Ls(args) => ls::run(&cx, args).await,
        Command::Cp(args) => cp::run(&cx, args).await,
        Command::Shell(args) => shell::run(&cx, args).await,
        Command::Pause(args) => transition::pause(&cx, args).await,
        Command::Resume(args) => transition::resume(&cx, args).await,
        Command::Fork(args) => fork::run(&cx, args).await,
        Command::Rm(args) => rm::run(&cx, args).await,
        Command::Template(args) => template::run(&cx, args).await,
        Command::Pool(args) => pool::run(&cx, args).await,
        Command::Top(args) => top::run(&cx, args).await,
        Command::Key(args) => key::run(&cx, args).await,
        Command::Gc(args) => gc::run(&cx, args).await,
        Command::VerifyIdentity(args) => verify_identity::run(&cx, args).await,
        Command::Serve(_)
        | Command::Doctor
        | Command::Completions(_)
        | Command::Man(_)
        | Command::Version => {
            unreachable!("handled without a client")
        }
    }
}

/// Whether a command line that could not be parsed was meant for `run`, `exec` or `shell`, whose codes below
/// 125 belong to the remote command.
fn runs_a_command(args: impl Iterator<Item = std::ffi::OsString>) -> bool {
    let mut args = args.map(|arg| arg.to_string_lossy().into_owned());
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--url" | "--api-key" => {
                args.next();
            }
            "run" | "exec" | "shell" => return true,
            flag if flag.starts_with('-') => {}
            _ => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_subcommand_says_what_it_is_for_and_shows_it() {
        for command in Cli::command().get_subcommands() {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(!about.is_empty(), "{}", command.get_name());
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Examples:\n  "), "{}", command.get_name());
        }
    }

    #[test]
    fn remote_arguments_are_left_alone() {
        let parse = |args: &[&str]| Cli::try_parse_from(args).unwrap().command;
        let Command::Exec(args) = parse(&["rethaw", "exec", "x", "--", "ls", "--json", "-n"])
        else {
            panic!("exec");
        };
        assert_eq!(args.argv, ["ls", "--json", "-n"]);
        let Command::Exec(args) = parse(&["rethaw", "exec", "-n", "x", "ls", "-l", "--", "a"])
        else {
            panic!("exec");
        };
        assert!(args.options.no_stdin);
        assert_eq!(args.argv, ["ls", "-l", "--", "a"]);
        let Command::Run(args) = parse(&["rethaw", "run", "-e", "A=1", "sh", "-c", "exit 3"])
        else {
            panic!("run");
        };
        assert_eq!(args.argv, ["sh", "-c", "exit 3"]);
        assert_eq!(args.template, "base");
    }

    #[test]
    fn global_flags_go_anywhere_before_the_command() {
        for args in [&["rethaw", "--json", "ls"][..], &["rethaw", "ls", "--json"]] {
            assert!(Cli::try_parse_from(args).unwrap().global.json);
        }
    }

    #[test]
    fn wrong_usage_is_refused() {
        for args in [
            &["rethaw", "run"][..],
            &["rethaw", "exec", "x"],
            &["rethaw", "exec", "x", "--shell", "a", "--", "b"],
            &["rethaw", "run", "-d", "--", "ls"],
            &["rethaw", "run", "--rm", "--keep", "ls"],
            &["rethaw", "rm"],
            &["rethaw", "rm", "--all", "x"],
            &["rethaw", "fork", "x", "--count", "0"],
            &["rethaw", "serve", "--memory-mib", "1"],
            &["rethaw", "pool", "set", "base", "-1"],
        ] {
            assert!(Cli::try_parse_from(args).is_err(), "{args:?}");
        }
    }

    #[test]
    fn a_mistyped_exec_does_not_look_like_the_commands_code() {
        let meant = |args: &[&str]| runs_a_command(args.iter().map(Into::into));
        assert!(meant(&["--url", "ls", "exec", "--nonsense"]));
        assert!(meant(&["--json", "run"]));
        assert!(!meant(&["rm", "run"]));
        assert!(!meant(&[]));
    }
}
