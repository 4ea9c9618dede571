//! The template's own hooks, `/etc/rethaw/restore.d/*`, in the order of their names. They run as
//! root while the workload is still frozen, and see the new identity in their environment; each
//! must end with 0 within its time.

use super::proof::{Context, Item, ItemError, Reading, Work};
use super::ready;
use crate::agent::Agent;
use crate::exec::tool;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const DIR: &str = "/etc/rethaw/restore.d";
/// Time for one hook: one that hangs is found, and named, before the others have no time left.
const EACH: Duration = Duration::from_secs(5);
/// Time for all hooks together when the request does not say.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Of a hook that failed, this much of its output is told.
const SHOWN: usize = 500;

/// The item.
#[derive(Debug)]
pub struct Hooks {
    hooks: Vec<PathBuf>,
    /// Exit code of each that has run.
    results: Vec<(String, i32, String)>,
}

impl Hooks {
    /// The hooks of a machine that waits for its identity.
    pub fn find(agent: &Agent) -> Self {
        Self { hooks: ready::hooks(agent), results: Vec::new() }
    }

    async fn run(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        let timeout = context.request.hooks_timeout_seconds;
        let timeout = timeout.and_then(|s| Duration::try_from_secs_f64(s).ok()).unwrap_or(TIMEOUT);
        let until = Instant::now() + timeout;
        let env = environment(context);
        for hook in &self.hooks {
            let name = hook.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let left = until.saturating_duration_since(Instant::now()).min(EACH);
            let path = hook.to_string_lossy();
            let output = tool::run(&[&path], &env, left).await;
            let output = output.map_err(ItemError::io(format!("hook {name}")))?;
            let text: String = output.text.chars().take(SHOWN).collect();
            self.results.push((name, output.code, text));
            if output.code != 0 {
                break;
            }
        }
        Ok(())
    }
}

/// What is in the folder now.
pub fn list(agent: &Agent) -> Vec<PathBuf> {
    let entries = fs::read_dir(agent.path(DIR)).into_iter().flatten().flatten();
    let mut hooks: Vec<PathBuf> = entries
        .filter(|e| !e.file_name().to_string_lossy().starts_with('.'))
        .map(|e| e.path())
        .filter(|p| {
            fs::metadata(p).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
        .collect();
    hooks.sort_unstable();
    hooks
}

fn environment(context: &Context<'_>) -> Vec<(String, String)> {
    let request = context.request;
    let mut env = vec![
        ("RETHAW_GENERATION".to_owned(), request.generation.clone()),
        ("RETHAW_HOSTNAME".to_owned(), request.hostname.clone()),
        ("RETHAW_MACHINE_ID".to_owned(), request.machine_id.clone()),
    ];
    for (name, value) in &request.extra {
        let legal = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        env.push((
            format!("RETHAW_{}", name.chars().map(legal).collect::<String>()),
            value.clone(),
        ));
    }
    env
}

impl Item for Hooks {
    fn name(&self) -> &'static str {
        "hooks"
    }

    fn not_applicable(&self, _: &Context<'_>) -> Option<String> {
        self.hooks.is_empty().then(|| format!("no hooks in {DIR}"))
    }

    fn read(&self, _: &Context<'_>) -> Result<Reading, ItemError> {
        let mut reading = Reading::default();
        for (name, code, _) in &self.results {
            reading.value.push_str(&format!("{name}={code} "));
            reading.details.insert(name.clone(), format!("exit {code}"));
        }
        Ok(reading)
    }

    fn apply(&mut self, _: &Context<'_>) -> Result<(), ItemError> {
        Ok(())
    }

    fn work<'a>(&'a mut self, context: &'a Context<'_>) -> Option<Work<'a>> {
        Some(Box::pin(self.run(context)))
    }

    fn check(&self, _: &Context<'_>, _: &Reading, _: &Reading) -> Result<(), ItemError> {
        let failed = self.results.iter().find(|(_, code, _)| *code != 0);
        if let Some((name, code, text)) = failed {
            return Err(ItemError::Mismatch {
                wanted: "exit code 0 of every hook".to_owned(),
                got: format!("{name} ended with {code}: {}", text.trim()),
            });
        }
        if self.results.len() == self.hooks.len() {
            return Ok(());
        }
        let (wanted, got) = (self.hooks.len().to_string(), self.results.len().to_string());
        Err(ItemError::Mismatch { wanted: format!("{wanted} hooks run"), got })
    }
}
