//! What a derived template is made of: its parent, and steps in their order.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Changes when the same steps come to mean something else.
const KEY_FORMAT: u32 = 1;
/// Steps of one build.
const MAX_STEPS: usize = 200;
const MAX_TIMEOUT_SECONDS: f64 = 24.0 * 3600.0;
/// How long a command may take when its step does not say.
const RUN_TIMEOUT: Duration = Duration::from_secs(600);
/// How long something may be waited for when its step does not say.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
/// Characters of a template's name.
const MAX_NAME: usize = 64;
/// Characters of a step in messages.
const SHOWN: usize = 120;

/// A build.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Name of the template it starts from.
    pub from: String,
    /// What is done in it.
    #[serde(default)]
    pub steps: Vec<Step>,
}

/// One step: an object with one member, named after what it does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// A command for `/bin/sh`, to its end.
    Run(Command),
    /// An archive, unpacked in a folder.
    Copy(Copy),
    /// Variables for the steps that follow and for sandboxes.
    Env(BTreeMap<String, String>),
    /// The folder the steps that follow run in; made if it is not there.
    Workdir(String),
    /// The user the steps that follow run as.
    User(String),
    /// A command for `/bin/sh` that goes on, in the template and so in every sandbox.
    Start(Command),
    /// Waits for a port of the VM's own, or for a command to end with 0.
    Wait(Wait),
    /// A command that must end with 0 in a clone before the template is published. The memory that
    /// it needs is put in place ahead of time in later clones.
    Check(Command),
}

/// A command, alone or with a time limit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a command, or {\"command\", \"timeout_seconds\"}")]
pub enum Command {
    /// The command.
    Plain(String),
    /// The command and how long it may take.
    Limited {
        /// The command.
        command: String,
        /// How long it may take.
        timeout_seconds: f64,
    },
}

/// What is copied, and where to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Copy {
    /// The folder it is unpacked in.
    pub dst: String,
    /// SHA-256 of the tar archive, which was uploaded.
    pub archive_sha256: String,
}

/// What is waited for: one of the two.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wait {
    /// A TCP port of the VM's own that is to accept connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// A command that is to end with 0; it is run again until it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// How long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<f64>,
}

impl Command {
    /// The command.
    pub fn text(&self) -> &str {
        match self {
            Self::Plain(command) | Self::Limited { command, .. } => command,
        }
    }

    /// How long it may take.
    pub fn timeout(&self) -> Duration {
        match self {
            Self::Plain(_) => RUN_TIMEOUT,
            Self::Limited { timeout_seconds, .. } => Duration::from_secs_f64(*timeout_seconds),
        }
    }

    fn check(&self) -> Result<(), String> {
        if let Self::Limited { timeout_seconds, .. } = self {
            check_timeout(*timeout_seconds)?;
        }
        check_command(self.text())
    }
}

impl Wait {
    /// How long.
    pub fn timeout(&self) -> Duration {
        self.timeout_seconds.map_or(WAIT_TIMEOUT, Duration::from_secs_f64)
    }
}

fn check_timeout(seconds: f64) -> Result<(), String> {
    if seconds > 0.0 && seconds <= MAX_TIMEOUT_SECONDS {
        return Ok(());
    }
    Err(format!(".timeout_seconds: {seconds} is not above 0 and up to {MAX_TIMEOUT_SECONDS}"))
}

fn check_command(command: &str) -> Result<(), String> {
    if command.trim().is_empty() || command.contains('\0') {
        return Err(": a command is needed, without NUL".to_owned());
    }
    Ok(())
}

fn check_path(path: &str) -> Result<(), String> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(());
    }
    Err(format!(": {path:?} is no absolute path"))
}

impl Step {
    /// Its kind, as the API names it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Run(_) => "run",
            Self::Copy(_) => "copy",
            Self::Env(_) => "env",
            Self::Workdir(_) => "workdir",
            Self::User(_) => "user",
            Self::Start(_) => "start",
            Self::Wait(_) => "wait",
            Self::Check(_) => "check",
        }
    }

    /// What it does, on one line.
    pub fn summary(&self) -> String {
        let text = match self {
            Self::Run(c) | Self::Start(c) | Self::Check(c) => c.text().to_owned(),
            Self::Copy(copy) => copy.dst.clone(),
            // Names only: values may be secrets.
            Self::Env(env) => env.keys().cloned().collect::<Vec<_>>().join(" "),
            Self::Workdir(text) | Self::User(text) => text.clone(),
            Self::Wait(Wait { port: Some(port), .. }) => format!("port {port}"),
            Self::Wait(wait) => wait.command.clone().unwrap_or_default(),
        };
        let line = text.lines().next().unwrap_or_default();
        let cut: String = line.chars().take(SHOWN).collect();
        let more = if cut.len() < text.len() { "..." } else { "" };
        format!("{} {cut}{more}", self.kind())
    }

    /// What is wrong with it, beginning with the place in it.
    fn check(&self) -> Result<(), String> {
        let place = |e: String| format!(".{}{e}", self.kind());
        match self {
            Self::Run(command) | Self::Start(command) | Self::Check(command) => {
                command.check().map_err(place)
            }
            Self::Copy(copy) => {
                check_path(&copy.dst).map_err(|e| place(format!(".dst{e}")))?;
                if is_sha256(&copy.archive_sha256) {
                    return Ok(());
                }
                Err(place(".archive_sha256: is not 64 hexadecimal digits in lower case".to_owned()))
            }
            Self::Env(env) => env.iter().try_for_each(|(name, value)| {
                if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                    return Err(place(format!(": {name:?} is no name, or its value holds a NUL")));
                }
                Ok(())
            }),
            Self::Workdir(path) => check_path(path).map_err(place),
            Self::User(user) if user.is_empty() || user.contains(['\0', ':']) => {
                Err(place(format!(": {user:?} is no user name")))
            }
            Self::User(_) => Ok(()),
            Self::Wait(wait) => {
                wait.timeout_seconds.map_or(Ok(()), check_timeout).map_err(place)?;
                match (wait.port, &wait.command) {
                    (Some(port), None) if port > 0 => Ok(()),
                    (None, Some(command)) => {
                        check_command(command).map_err(|e| place(format!(".command{e}")))
                    }
                    _ => Err(place(": give either a port above 0 or a command".to_owned())),
                }
            }
        }
    }
}

/// Whether this is how a SHA-256 is written here.
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// What is wrong with a template's name. Names are parts of paths, of URLs and of files.
pub fn check_name(name: &str) -> Result<(), String> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b);
    let starts = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if starts && name.len() <= MAX_NAME && name.bytes().all(legal) {
        return Ok(());
    }
    Err(format!(
        "name: {name:?} is not 1 to {MAX_NAME} of a-z, 0-9, '-', '_' and '.', beginning with a \
         letter or digit"
    ))
}

impl Spec {
    /// From steps as they were written; what is wrong with them otherwise, naming the field.
    pub fn parse(from: String, steps: Vec<Value>) -> Result<Self, String> {
        let parse = |(number, step): (usize, Value)| {
            serde_path_to_error::deserialize(step).map_err(|e| {
                let place = e.path().to_string();
                let dot = if place == "." { "" } else { "." };
                let place = place.trim_start_matches('.');
                format!("steps[{number}]{dot}{place}: {}", e.inner())
            })
        };
        let steps = steps.into_iter().enumerate().map(parse).collect::<Result<_, _>>()?;
        let spec = Self { from, steps };
        spec.check().map(|()| spec)
    }

    fn check(&self) -> Result<(), String> {
        if self.steps.len() > MAX_STEPS {
            return Err(format!("steps: {} are more than {MAX_STEPS}", self.steps.len()));
        }
        for (number, step) in self.steps.iter().enumerate() {
            step.check().map_err(|e| format!("steps[{number}]{e}"))?;
        }
        Ok(())
    }

    /// Id of the snapshot it gives on this parent: the same steps with the same inputs on the same
    /// parent are the same template.
    pub fn snapshot_id(&self, parent: &str) -> String {
        // Serialising plain data to memory does not fail.
        let steps = serde_json::to_string(&self.steps).unwrap_or_default();
        let text = format!("build {KEY_FORMAT}\nparent {parent}\nsteps {steps}\n");
        hex::encode(Sha256::digest(text))[..20].to_owned()
    }

    /// SHA-256 of every archive it needs.
    pub fn inputs(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().filter_map(|step| match step {
            Step::Copy(copy) => Some(copy.archive_sha256.as_str()),
            _ => None,
        })
    }

    /// The variables its sandboxes have, on top of its parent's.
    pub fn env(&self) -> impl Iterator<Item = (&String, &String)> {
        self.steps.iter().flat_map(|step| match step {
            Step::Env(env) => env.iter().collect::<Vec<_>>(),
            _ => Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(steps: &str) -> Result<Spec, String> {
        Spec::parse("base".to_owned(), serde_json::from_str(steps).unwrap())
    }

    #[test]
    fn all_kinds_are_understood() {
        let sha = "0".repeat(64);
        let text = format!(
            r#"[{{"run": "a"}}, {{"run": {{"command": "b", "timeout_seconds": 3}}}},
                {{"copy": {{"dst": "/srv", "archive_sha256": "{sha}"}}}}, {{"env": {{"A": "b"}}}},
                {{"workdir": "/srv"}}, {{"user": "nobody"}}, {{"start": "python3 x"}},
                {{"wait": {{"port": 80}}}}, {{"wait": {{"command": "true", "timeout_seconds": 5}}}},
                {{"check": "true"}}]"#
        );
        let spec = spec(&text).unwrap();
        let kinds: Vec<_> = spec.steps.iter().map(Step::kind).collect();
        let wanted =
            ["run", "run", "copy", "env", "workdir", "user", "start", "wait", "wait", "check"];
        assert_eq!(kinds, wanted);
        assert_eq!(spec.inputs().collect::<Vec<_>>(), [sha.as_str()]);
        assert_eq!(spec.env().collect::<Vec<_>>(), [(&"A".to_owned(), &"b".to_owned())]);
        let again: Spec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        assert_eq!(again, spec);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (steps, wanted) in [
            (r#"[{"run": " "}]"#, "steps[0].run: a command is needed"),
            (r#"[{"run": {"command": "x", "timeout_seconds": -1}}]"#, "run.timeout_seconds: -1"),
            (r#"[{"run": 5}]"#, "steps[0].run: a command, or"),
            (r#"[{"walk": "x"}]"#, "steps[0]: unknown variant `walk`, expected one of `run`"),
            (r#"[{"copy": {"dst": "srv", "archive_sha256": ""}}]"#, "copy.dst: \"srv\" is no abs"),
            (r#"[{"copy": {"dst": "/srv", "archive_sha256": "x"}}]"#, "archive_sha256: is not 64"),
            (r#"[{"env": {"A=": "b"}}]"#, "steps[0].env: \"A=\""),
            (r#"[{"run": "x"}, {"wait": {}}]"#, "steps[1].wait: give either"),
            (r#"[{"wait": {"port": 80, "command": "x"}}]"#, "wait: give either"),
            (r#"[{"user": ""}]"#, "steps[0].user"),
        ] {
            let error = spec(steps).unwrap_err();
            assert!(error.contains(wanted), "{steps}: {error}");
        }
    }

    #[test]
    fn names_are_fit_for_paths() {
        for good in ["a", "py3.12", "0-x_y"] {
            assert_eq!(check_name(good), Ok(()));
        }
        for bad in ["", ".", "-a", "A", "a/b", "a b", &"a".repeat(65)] {
            assert!(check_name(bad).unwrap_err().starts_with("name: "), "{bad}");
        }
    }

    #[test]
    fn the_same_build_has_the_same_id() {
        let one = spec(r#"[{"env": {"A": "1", "B": "2"}}, {"run": "x"}]"#).unwrap();
        let same = spec(r#"[{"env": {"B": "2", "A": "1"}}, {"run": "x"}]"#).unwrap();
        let other = spec(r#"[{"env": {"A": "1", "B": "3"}}, {"run": "x"}]"#).unwrap();
        assert_eq!(one.snapshot_id("p"), same.snapshot_id("p"));
        assert_ne!(one.snapshot_id("p"), other.snapshot_id("p"));
        assert_ne!(one.snapshot_id("p"), one.snapshot_id("q"));
        assert_eq!(one.snapshot_id("p").len(), 20);
    }

    #[test]
    fn summaries_are_short_and_hold_no_values() {
        let spec = spec(r#"[{"env": {"TOKEN": "hunter2"}}, {"run": "a\nb"}]"#).unwrap();
        assert_eq!(spec.steps[0].summary(), "env TOKEN");
        assert_eq!(spec.steps[1].summary(), "run a...");
    }
}
