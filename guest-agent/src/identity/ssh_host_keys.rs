//! Host keys of an SSH server, where the template has one: the template's are removed, a new
//! Ed25519 key is made, and a running server reads it. A template without a server (the usual one)
//! pays one look for it; with one, making the key is the only tool a restore may start.

use super::proof::{Context, Item, ItemError, Reading, Work};
use super::write;
use crate::agent::Agent;
use crate::exec::tool;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

const DIR: &str = "/etc/ssh";
const SERVER: &str = "/usr/sbin/sshd";
const KEYGEN: &str = "/usr/bin/ssh-keygen";
const KEY: &str = "/etc/ssh/ssh_host_ed25519_key";
const PID: &str = "/run/sshd.pid";
const DEADLINE: Duration = Duration::from_secs(5);

/// The item.
#[derive(Debug)]
pub struct SshHostKeys;

/// Whether the template has an SSH server.
pub fn in_template(agent: &Agent) -> bool {
    agent.path(SERVER).exists()
}

fn keys(context: &Context<'_>) -> Vec<PathBuf> {
    let entries = fs::read_dir(context.agent.path(DIR)).into_iter().flatten().flatten();
    let mut keys: Vec<PathBuf> = entries
        .filter(|e| e.file_name().to_string_lossy().starts_with("ssh_host_"))
        .map(|e| e.path())
        .collect();
    keys.sort_unstable();
    keys
}

/// Makes a key, and has a server that runs read it.
async fn make(context: &Context<'_>) -> Result<(), ItemError> {
    let path = context.agent.path(KEY);
    let argv = [KEYGEN, "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", &path.to_string_lossy()];
    let output = tool::run(&argv, &[], DEADLINE).await.map_err(ItemError::io("ssh-keygen"))?;
    if output.code != 0 {
        let got = format!("{}: {}", output.code, output.text.trim());
        return Err(ItemError::Mismatch { wanted: "exit 0 of ssh-keygen".to_owned(), got });
    }
    // A server that runs reads its keys again on this signal; one that does not will at start.
    let pid = write::read(&context.agent.path(PID))?.trim().parse::<i32>();
    if let Some(pid) = pid.ok().filter(|pid| *pid > 1) {
        let hup = kill(Pid::from_raw(pid), Signal::SIGHUP);
        hup.map_err(|e| ItemError::io(format!("signal sshd ({pid})"))(e.into()))?;
    }
    Ok(())
}

impl Item for SshHostKeys {
    fn name(&self) -> &'static str {
        "ssh_host_keys"
    }

    fn not_applicable(&self, context: &Context<'_>) -> Option<String> {
        (!in_template(context.agent)).then(|| "the template has no SSH server".to_owned())
    }

    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError> {
        let mut value = String::new();
        for key in keys(context).iter().filter(|k| k.extension().is_some_and(|e| e == "pub")) {
            value.push_str(&write::read(key)?);
        }
        Ok(Reading::of(value))
    }

    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        for key in keys(context) {
            fs::remove_file(&key).map_err(ItemError::io(format!("remove {}", key.display())))?;
        }
        Ok(())
    }

    fn work<'a>(&'a mut self, context: &'a Context<'_>) -> Option<Work<'a>> {
        Some(Box::pin(make(context)))
    }

    fn check(&self, context: &Context<'_>, old: &Reading, new: &Reading) -> Result<(), ItemError> {
        let fresh = new.value.starts_with("ssh-ed25519 ") && new.value != old.value;
        if fresh && keys(context).len() == 2 {
            return Ok(());
        }
        let got = format!("{} key files, changed: {}", keys(context).len(), new.value != old.value);
        Err(ItemError::Mismatch { wanted: "one new Ed25519 key".to_owned(), got })
    }
}
