//! `rethaw man`: manual pages, generated from the same definitions as help and completions.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, CommandFactory};
use clap_mangen::Man;

use super::output;

/// Flags of `rethaw man`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw man | man -l -
  rethaw man exec | man -l -
  rethaw man --dir /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Subcommand, as in `rethaw man template build`; without one, the page of rethaw itself
    #[arg(value_name = "COMMAND", conflicts_with = "dir")]
    pub command: Vec<String>,

    /// Write all pages into this folder
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Prints a page, or writes all of them.
pub fn run(args: &ManArgs) -> anyhow::Result<ExitCode> {
    match &args.dir {
        Some(dir) => write_all(dir)?,
        None => output::write(&page(&args.command)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The program, with names such as `rethaw-template-build` for its subcommands.
fn program() -> clap::Command {
    let mut program = super::Cli::command().disable_help_subcommand(true);
    program.build();
    program
}

fn write_all(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    clap_mangen::generate_to(program(), dir)
        .with_context(|| format!("cannot write to {}", dir.display()))
}

fn page(path: &[String]) -> anyhow::Result<Vec<u8>> {
    let mut command = program();
    let mut name = "rethaw".to_owned();
    for part in path {
        let found = command.find_subcommand(part).cloned();
        command = found.with_context(|| format!("{name} has no subcommand {part:?}"))?;
        name = format!("{name}-{part}");
    }
    let mut page = Vec::new();
    Man::new(command).render(&mut page)?;
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(
        command: &clap::Command,
        path: &[String],
        look: &mut impl FnMut(&clap::Command, &[String]),
    ) {
        look(command, path);
        for sub in command.get_subcommands() {
            let mut path = path.to_vec();
            path.push(sub.get_name().to_owned());
            walk(sub, &path, look);
        }
    }

    #[test]
    fn help_manual_and_completions_know_the_same() {
        let mut scripts = Vec::new();
        for shell in
            [clap_complete::Shell::Bash, clap_complete::Shell::Zsh, clap_complete::Shell::Fish]
        {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut program(), "rethaw", &mut script);
            scripts.push(String::from_utf8(script).unwrap());
        }
        walk(&program(), &[], &mut |command, path| {
            let manual = String::from_utf8(page(path).unwrap()).unwrap().replace("\\-", "-");
            let help = command.clone().render_long_help().to_string();
            for flag in command.get_arguments().filter(|a| !a.is_hide_set()) {
                let Some(long) = flag.get_long() else { continue };
                let wanted = format!("--{long}");
                assert!(manual.contains(&wanted), "{path:?}: {wanted} is not in the manual");
                assert!(help.contains(&wanted), "{path:?}: {wanted} is not in the help");
                for script in &scripts {
                    // fish leaves the dashes out.
                    assert!(script.contains(long), "{path:?}: {wanted} cannot be completed");
                }
            }
            if let Some(name) = path.last() {
                assert!(scripts.iter().all(|s| s.contains(name)), "{name} cannot be completed");
                assert!(manual.contains("Examples:") || path.len() > 1, "{path:?}: no examples");
            }
        });
    }

    #[test]
    fn every_subcommand_has_a_page_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        write_all(dir.path()).unwrap();
        for name in ["rethaw.1", "rethaw-exec.1", "rethaw-template-build.1", "rethaw-key-create.1"]
        {
            assert!(dir.path().join(name).is_file(), "{name}");
        }
        assert!(page(&["nothing".to_owned()]).is_err());
    }
}
