//! Steps of a build, in the order in which they were typed, or out of a file.

use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::env;
use super::copy::{self, Archive, CopyError};

/// One step as typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A command for /bin/sh.
    Run(String),
    /// A local file or folder, and where it goes.
    Copy {
        /// Here.
        src: PathBuf,
        /// There.
        dst: String,
    },
    /// A variable for the steps that follow and for sandboxes.
    Env(String, String),
    /// The folder the steps that follow run in.
    Workdir(String),
    /// The user the steps that follow run as.
    User(String),
    /// A command that goes on in every sandbox.
    Start(String),
    /// A port to wait for.
    WaitPort(u16),
    /// A command to wait for.
    WaitFor(String),
    /// A command that has to work in a clone.
    Check(String),
}

/// `--run` and its like, which build on each other and so keep their order.
#[derive(Debug, Clone, Default)]
pub struct Steps(pub Vec<Step>);

const FLAGS: [(&str, &str, &str); 9] = [
    ("run", "COMMAND", "Run a command with /bin/sh; steps keep the order they are given in"),
    ("copy", "SRC:DST", "Copy a local file or folder into the template"),
    ("env", "NAME=VALUE", "Set a variable for the steps that follow and for sandboxes"),
    ("workdir", "DIR", "Folder that the steps that follow run in"),
    ("user", "NAME", "User that the steps that follow run as"),
    ("start", "COMMAND", "Start a command that goes on in every sandbox"),
    ("wait-port", "PORT", "Wait until something listens on a port"),
    ("wait-for", "COMMAND", "Wait until a command ends with 0"),
    ("check", "COMMAND", "Run a command in a clone; the template is published if it ends with 0"),
];

impl Step {
    fn parse(flag: &str, value: &str) -> Result<Self, String> {
        match flag {
            "run" => Ok(Self::Run(value.to_owned())),
            "workdir" => Ok(Self::Workdir(value.to_owned())),
            "user" => Ok(Self::User(value.to_owned())),
            "start" => Ok(Self::Start(value.to_owned())),
            "wait-for" => Ok(Self::WaitFor(value.to_owned())),
            "check" => Ok(Self::Check(value.to_owned())),
            "wait-port" => match value.parse() {
                Ok(port) if port > 0 => Ok(Self::WaitPort(port)),
                _ => Err("it must be a number from 1 to 65535".to_owned()),
            },
            "env" => env::parse_pair(value).map(|(name, value)| Self::Env(name, value)),
            _ => match value.rsplit_once(':') {
                Some((src, dst)) if !src.is_empty() && dst.starts_with('/') => {
                    Ok(Self::Copy { src: src.into(), dst: dst.to_owned() })
                }
                _ => Err("write it as SRC:/DST, with an absolute path behind the colon".to_owned()),
            },
        }
    }

    /// As the API takes it; what is copied is read now.
    fn to_json(&self, archives: &mut Vec<Archive>) -> Result<Value, CopyError> {
        Ok(match self {
            Self::Run(command) => json!({ "run": command }),
            Self::Copy { src, dst } => {
                let (step, archive) = copy::step(src, dst)?;
                archives.push(archive);
                json!({ "copy": step })
            }
            Self::Env(name, value) => json!({ "env": { name: value } }),
            Self::Workdir(dir) => json!({ "workdir": dir }),
            Self::User(user) => json!({ "user": user }),
            Self::Start(command) => json!({ "start": command }),
            Self::WaitPort(port) => json!({ "wait": { "port": port } }),
            Self::WaitFor(command) => json!({ "wait": { "command": command } }),
            Self::Check(command) => json!({ "check": command }),
        })
    }
}

impl Args for Steps {
    fn augment_args(command: Command) -> Command {
        FLAGS.iter().fold(command, |command, (name, value, help)| {
            let flag = *name;
            let arg = Arg::new(flag)
                .long(flag)
                .value_name(*value)
                .help(*help)
                .action(ArgAction::Append)
                .value_parser(move |text: &str| Step::parse(flag, text));
            command.arg(arg)
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Steps {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut steps: Vec<(usize, Step)> = Vec::new();
        for (flag, ..) in FLAGS {
            let values = matches
                .try_get_many::<Step>(flag)
                .map_err(|e| clap::Error::raw(ErrorKind::InvalidValue, e))?;
            let at = matches.indices_of(flag).into_iter().flatten();
            steps.extend(at.zip(values.into_iter().flatten().cloned()));
        }
        steps.sort_by_key(|(at, _)| *at);
        Ok(Self(steps.into_iter().map(|(_, step)| step).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// A file of steps, TOML or JSON:
///
/// ```toml
/// from = "base"
/// [[steps]]
/// run = "pip install numpy"
/// [[steps]]
/// copy = { src = "app", dst = "/srv/app" }    # src is relative to this file
/// ```
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepFile {
    /// Template to start from.
    pub from: Option<String>,
    /// The steps, of any kind the service knows.
    #[serde(default)]
    pub steps: Vec<Map<String, Value>>,
    /// What its steps copy.
    #[serde(skip)]
    archives: Vec<Archive>,
}

/// A copy step of a file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PackStepError {
    /// It does not say what goes where.
    #[error("copy needs src and dst, both text")]
    Incomplete,
    /// What it copies cannot be read.
    #[error(transparent)]
    Copy(#[from] CopyError),
}

/// Packs what a step copies, from `src` relative to `dir`, and makes it the step that the API takes.
/// Other steps are left as they are.
pub fn pack(step: &mut Map<String, Value>, dir: &Path) -> Result<Option<Archive>, PackStepError> {
    let Some(copied) = step.get_mut("copy") else { return Ok(None) };
    let (Some(src), Some(dst)) = (copied["src"].as_str(), copied["dst"].as_str()) else {
        return Err(PackStepError::Incomplete);
    };
    let (step, archive) = copy::step(&dir.join(src), dst)?;
    *copied = step;
    Ok(Some(archive))
}

/// A file of steps that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StepFileError {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// Something it copies cannot be read.
    #[error(transparent)]
    Copy(#[from] CopyError),
}

impl StepFile {
    /// Reads a file and everything its steps copy.
    pub fn read(path: &Path) -> Result<Self, StepFileError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| StepFileError::Read { path: path.to_owned(), source })?;
        let wrong = |reason| StepFileError::Parse { path: path.to_owned(), reason };
        let mut file = Self::parse(&text).map_err(wrong)?;
        let dir = path.parent().unwrap_or(Path::new("."));
        let StepFile { steps, archives, .. } = &mut file;
        for (number, step) in steps.iter_mut().enumerate() {
            let packed = pack(step, dir).map_err(|e| match e {
                PackStepError::Incomplete => wrong(format!("step {}: {e}", number + 1)),
                PackStepError::Copy(e) => e.into(),
            })?;
            archives.extend(packed);
        }
        Ok(file)
    }

    fn parse(text: &str) -> Result<Self, String> {
        if text.trim_start().starts_with('{') {
            return serde_json::from_str(text).map_err(|e| e.to_string());
        }
        toml::from_str(text).map_err(|e| e.to_string().trim_end().to_owned())
    }
}

/// Steps of the file, then those of the flags, and what they copy.
pub fn all(file: StepFile, flags: &Steps) -> Result<(Vec<Value>, Vec<Archive>), CopyError> {
    let mut archives = file.archives;
    let mut steps: Vec<Value> = file.steps.into_iter().map(Value::Object).collect();
    for step in &flags.0 {
        steps.push(step.to_json(&mut archives)?);
    }
    Ok((steps, archives))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(args: &[&str]) -> Result<Vec<Step>, clap::Error> {
        let command = Steps::augment_args(Command::new("build").no_binary_name(true));
        Steps::from_arg_matches(&command.try_get_matches_from(args)?).map(|steps| steps.0)
    }

    #[test]
    fn steps_keep_their_order() {
        let steps = typed(&[
            "--run",
            "one",
            "--copy",
            "a:b:/c",
            "--run",
            "two",
            "--env",
            "X=y=z",
            "--workdir",
            "/w",
            "--start",
            "serve",
            "--wait-port",
            "80",
        ]);
        assert_eq!(
            steps.unwrap(),
            [
                Step::Run("one".into()),
                Step::Copy { src: "a:b".into(), dst: "/c".into() },
                Step::Run("two".into()),
                Step::Env("X".into(), "y=z".into()),
                Step::Workdir("/w".into()),
                Step::Start("serve".into()),
                Step::WaitPort(80),
            ]
        );
        assert!(typed(&["--copy", "a:b"]).is_err());
        assert!(typed(&["--env", "X"]).is_err());
        assert!(typed(&["--wait-port", "0"]).is_err());
        assert_eq!(typed(&[]).unwrap(), []);
    }

    #[test]
    fn both_file_forms_say_the_same() {
        let toml = "from = \"base\"\n[[steps]]\nrun = \"x\"\n[[steps]]\nwait = { port = 80 }\n";
        let json = r#" {"from": "base", "steps": [{"run": "x"}, {"wait": {"port": 80}}]}"#;
        let (toml, json) = (StepFile::parse(toml).unwrap(), StepFile::parse(json).unwrap());
        assert_eq!(toml.from.as_deref(), Some("base"));
        assert_eq!(toml.steps, json.steps);
        assert_eq!(toml.steps[1]["wait"]["port"], 80);
        let error = StepFile::parse("form = \"base\"").unwrap_err();
        assert!(error.contains("form"), "{error}");
    }

    #[test]
    fn copies_are_relative_to_the_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("app"), "x").unwrap();
        let file = dir.path().join("t.toml");
        std::fs::write(&file, "[[steps]]\ncopy = { src = \"app\", dst = \"/srv/app\" }\n").unwrap();
        let steps = StepFile::read(&file).unwrap().steps;
        assert_eq!(steps[0]["copy"]["dst"], "/srv");
        std::fs::write(&file, "[[steps]]\ncopy = { src = \"app\" }\n").unwrap();
        let error = StepFile::read(&file).unwrap_err().to_string();
        assert!(error.contains("step 1: copy needs src and dst"), "{error}");
    }
}
