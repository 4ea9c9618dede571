//! `rethaw shell`: a terminal in a sandbox, over a WebSocket.
//!
//! Binary messages are the terminal's bytes in both directions. Text messages are JSON:
//! `{"resize":{"cols":80,"rows":24}}` from here, `{"exit":{"code":0}}` from there.

mod link;
pub mod terminal;

use std::process::ExitCode;

use clap::Args;

use super::{Context, sandbox};

/// Flags of `rethaw shell`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw shell 3kx
  rethaw shell web --user user

Exit code: the shell's own; 125 when rethaw itself failed. For scripts there is `rethaw exec`.")]
pub struct ShellArgs {
    /// Sandbox: id, the beginning of one, or a name
    #[arg(value_name = "SANDBOX")]
    pub sandbox: String,

    /// User to run the shell as
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,
}

/// Runs the shell.
pub async fn run(cx: &Context, args: &ShellArgs) -> anyhow::Result<ExitCode> {
    let size = terminal::size()?;
    let id = sandbox::resolve(&cx.client, &args.sandbox).await?;
    let socket = link::open(&cx.client, &id, size, args.user.as_deref()).await?;
    // From here on nothing may be printed but what the remote terminal sends.
    let raw = terminal::Raw::enter()?;
    let ended = link::converse(socket, terminal::keys()).await;
    drop(raw);
    let code = ended.map_err(|e| anyhow::Error::new(e).context(format!("sandbox {id}")))?;
    Ok(code.into())
}
