//! `rethaw cp`: files and folders into a sandbox and out of it, streamed both ways.
//!
//! Where things land is as with `cp -r`: into a destination that is a folder, else under its name.
//! `-` is standard input or output.

mod download;
pub mod pack;
mod place;
mod unpack;
mod upload;

use std::process::ExitCode;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::Context;
use place::Place;

/// Pieces that files are read and sent in.
const PIECE: usize = 256 << 10;
/// Pieces on their way between the network and a thread that reads or writes files.
const IN_FLIGHT: usize = 8;

/// Flags of `rethaw cp`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw cp report.csv 3kx:/tmp/
  rethaw cp 3kx:/var/log/app.log .
  rethaw cp ./project web:/srv/project
  rethaw cp 3kx:/etc/hostname -
  tar c . | rethaw cp --tar - 3kx:/srv

A folder given as FOLDER/. is copied without its own name. Related: exec, shell.")]
pub struct CpArgs {
    /// Local path, SANDBOX:/PATH, or - for standard input
    #[arg(value_name = "SRC")]
    pub src: String,

    /// Local path, SANDBOX:/PATH, or - for standard output
    #[arg(value_name = "DST")]
    pub dst: String,

    /// Owner of what is made in the sandbox
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,

    /// Standard input is a tar archive to unpack in the folder DST
    #[arg(long)]
    pub tar: bool,

    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,
}

/// Why nothing was copied.
#[derive(Debug, thiserror::Error)]
pub enum CpError {
    /// Neither side is in a sandbox.
    #[error("neither {src:?} nor {dst:?} is in a sandbox: write one of them as SANDBOX:/PATH")]
    NoSandbox {
        /// Source.
        src: String,
        /// Destination.
        dst: String,
    },
    /// Both sides are.
    #[error("both sides are in a sandbox: copy to a local path first, or pipe one cp into another")]
    TwoSandboxes,
    /// `--tar` where no archive is read.
    #[error("--tar is for an archive on standard input, as in `rethaw cp --tar - SANDBOX:/FOLDER`")]
    TarNeedsInput,
}

/// Copies.
pub async fn run(cx: &Context, args: &CpArgs) -> anyhow::Result<ExitCode> {
    let src: Place = args.src.parse()?;
    let dst: Place = args.dst.parse()?;
    if args.tar && !matches!(src, Place::Standard) {
        return Err(CpError::TarNeedsInput.into());
    }
    let copied = match (src, dst) {
        (Place::Remote { .. }, Place::Remote { .. }) => return Err(CpError::TwoSandboxes.into()),
        (Place::Remote { sandbox, path }, dst) => {
            download::run(cx, args, &sandbox, &path, &dst).await?
        }
        (src, Place::Remote { sandbox, path }) => {
            upload::run(cx, args, &src, &sandbox, &path).await?
        }
        _ => {
            let (src, dst) = (args.src.clone(), args.dst.clone());
            return Err(CpError::NoSandbox { src, dst }.into());
        }
    };
    // Standard output may be the file itself.
    if cx.json && args.dst != "-" {
        let from_to = serde_json::json!({ "src": args.src, "dst": args.dst, "bytes": copied });
        super::output::json(&from_to)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A bar on standard error, or nothing where that is no terminal.
fn progress(quiet: bool, total: Option<u64>) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let (bar, style) = match total {
        Some(total) => {
            let style = "{bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  {eta}";
            (ProgressBar::new(total), style)
        }
        None => (ProgressBar::new_spinner(), "{spinner} {bytes}  {bytes_per_sec}"),
    };
    // Both templates are constants; a slip in one would show as the default style.
    match ProgressStyle::with_template(style) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
