//! Fail points: named steps at which the service can be told to kill itself or to stand still, so
//! that what a crash there leaves behind is tested on the binary that users run.
//!
//! `RETHAW_FAILPOINT=pause.published` kills the process (`SIGKILL`, no clean-up) when it first gets
//! there; `RETHAW_FAILPOINT=pause.published:wait` has everyone who gets there wait for
//! [`STAND_STILL`], long enough for somebody else to kill a VM meanwhile. Unset, which is how
//! services run, a step costs one load. A name that is not in [`NAMES`] is refused at start.

use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

/// Environment variable that names the step.
pub const VARIABLE: &str = "RETHAW_FAILPOINT";

/// How long a step with `:wait` takes longer.
const STAND_STILL: Duration = Duration::from_secs(3);

/// Every step there is, in the order in which an operation passes them.
pub const NAMES: &[&str] = &[
    // A VM restored while a request waits, also for a fork's clones.
    "restore.noted",
    "restore.spawned",
    "restore.loaded",
    "restore.running",
    "restore.identified",
    "claim.unparked",
    // While the guest takes the hand-over.
    "claim.noted",
    "claim.handed_over",
    "pause.begun",
    "pause.frozen",
    "pause.written",
    "pause.published",
    "pause.noted",
    "pause.killed",
    "resume.begun",
    "resume.spawned",
    "resume.running",
    "resume.revived",
    "resume.noted",
    "fork.frozen",
    "fork.written",
    "fork.thawed",
    "fork.published",
    "fork.cloned",
    "fork.done",
    // Of a template.
    "build.begun",
    "build.stepped",
    "build.settled",
    "build.written",
    "build.tried",
    "build.published",
    "build.noted",
    "template.forgotten",
    "delete.begun",
    "delete.killed",
    "delete.key_destroyed",
    "delete.noted",
];

#[derive(Debug, Clone, PartialEq, Eq)]
struct Armed {
    name: &'static str,
    wait: bool,
}

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

/// A fail point that does not exist was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{VARIABLE}={0:?}: no such step; there are {names}, each also with \":wait\"", names = NAMES.join(" "))]
pub struct UnknownStep(String);

fn parse(text: &str) -> Result<Armed, UnknownStep> {
    let (name, wait) = match text.strip_suffix(":wait") {
        Some(name) => (name, true),
        None => (text, false),
    };
    let known = NAMES.iter().find(|known| **known == name);
    known.map(|name| Armed { name, wait }).ok_or_else(|| UnknownStep(text.to_owned()))
}

/// Reads the environment; once, at start.
pub fn arm() -> Result<(), UnknownStep> {
    let armed = match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => Some(parse(&text)?),
        _ => None,
    };
    if let Some(armed) = &armed {
        tracing::warn!(step = armed.name, wait = armed.wait, "a fail point is set");
    }
    // The first call counts; there is no second one in a service.
    let _ = ARMED.set(armed);
    Ok(())
}

fn armed(step: &str) -> Option<&'static Armed> {
    debug_assert!(NAMES.contains(&step), "{step} is not in the list of fail points");
    ARMED.get()?.as_ref().filter(|armed| armed.name == step)
}

fn die(step: &str) {
    tracing::warn!(step, "fail point: killing this process");
    // Nothing after this line runs.
    let _ = kill_process(getpid(), Signal::KILL);
    std::process::abort();
}

/// This step was reached.
pub async fn reached(step: &str) {
    match armed(step) {
        None => {}
        Some(Armed { wait: false, .. }) => die(step),
        Some(_) => {
            tracing::warn!(step, "fail point: standing still for {STAND_STILL:?}");
            tokio::time::sleep(STAND_STILL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_steps_there_are_can_be_set() {
        assert_eq!(parse("pause.noted").unwrap(), Armed { name: "pause.noted", wait: false });
        assert_eq!(parse("fork.frozen:wait").unwrap(), Armed { name: "fork.frozen", wait: true });
        for wrong in ["pause", "pause.noted:", "pause.noted:stop", ":wait"] {
            let said = parse(wrong).unwrap_err().to_string();
            assert!(said.contains(wrong) && said.contains("resume.revived"), "{said}");
        }
    }
}
