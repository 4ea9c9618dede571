//! What the keys of workspaces are wrapped with: a master key in a file, or a command that asks
//! whoever keeps one.
//!
//! The command is run as `COMMAND wrap ID` with the key (64 hex digits) on its standard input, and
//! writes what is to be kept to its standard output; and as `COMMAND unwrap ID` the other way round.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use uffd_handler::seal::{KEY_LEN, Key, SealError};
use zeroize::Zeroizing;

/// How long the command may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// A wrapped key is never longer.
const MAX_WRAPPED: u64 = 64 << 10;

/// Why a key was not wrapped or unwrapped.
#[derive(Debug, thiserror::Error)]
pub enum WrapError {
    /// The master key file.
    #[error("master key file {path:?}: {source}")]
    MasterFile {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The master key file is not one.
    #[error(
        "master key file {path:?} does not hold 64 hex digits; without the right one, what was paused cannot be opened"
    )]
    NotAKey {
        /// The file.
        path: PathBuf,
    },
    /// The master key does not fit.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The command failed.
    #[error("{command} {verb}: {problem}")]
    Command {
        /// The command.
        command: String,
        /// `wrap` or `unwrap`.
        verb: &'static str,
        /// What happened.
        problem: String,
    },
}

/// Wraps and unwraps.
#[derive(Debug)]
pub enum MasterKey {
    /// With this key.
    Own(Key),
    /// By running this program with these arguments first.
    Command(Vec<String>),
}

fn purpose(id: &str) -> String {
    format!("workspace key {id}")
}

fn from_hex(text: &[u8]) -> Option<Key> {
    let mut bytes = Zeroizing::new([0; KEY_LEN]);
    hex::decode_to_slice(text.trim_ascii(), &mut *bytes).ok()?;
    Some(Key::from_bytes(*bytes))
}

fn to_hex(key: &Key) -> Zeroizing<String> {
    Zeroizing::new(hex::encode(key.expose()))
}

impl MasterKey {
    /// The key in a file; the file is made, readable by its owner only, when it is not there.
    pub fn from_file(path: &Path) -> Result<Self, WrapError> {
        let failed = |source| WrapError::MasterFile { path: path.to_owned(), source };
        match std::fs::read(path) {
            Ok(text) => {
                let text = Zeroizing::new(text);
                let key = from_hex(&text);
                key.map(Self::Own).ok_or_else(|| WrapError::NotAKey { path: path.to_owned() })
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let key = Key::generate()?;
                let write = || {
                    let mut options = File::options();
                    let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
                    file.write_all(to_hex(&key).as_bytes())?;
                    file.write_all(b"\n")?;
                    file.sync_all()?;
                    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
                };
                write().map_err(failed)?;
                Ok(Self::Own(key))
            }
            Err(e) => Err(failed(e)),
        }
    }

    pub(super) fn wrap(&self, id: &str, key: &Key) -> Result<Vec<u8>, WrapError> {
        match self {
            Self::Own(master) => Ok(master.seal(&purpose(id), key.expose())?),
            Self::Command(argv) => {
                let wrapped = run(argv, "wrap", id, to_hex(key).as_bytes())?;
                Ok(wrapped.to_vec())
            }
        }
    }

    pub(super) fn unwrap(&self, id: &str, wrapped: &[u8]) -> Result<Key, WrapError> {
        match self {
            Self::Own(master) => {
                let plain = master.open(&purpose(id), wrapped)?;
                let bytes = Zeroizing::new(
                    <[u8; KEY_LEN]>::try_from(&**plain).map_err(|_| SealError::Wrong)?,
                );
                Ok(Key::from_bytes(*bytes))
            }
            Self::Command(argv) => {
                let text = run(argv, "unwrap", id, wrapped)?;
                from_hex(&text).ok_or_else(|| {
                    failure(argv, "unwrap", "it did not write 64 hex digits".to_owned())
                })
            }
        }
    }
}

fn failure(argv: &[String], verb: &'static str, problem: String) -> WrapError {
    WrapError::Command { command: argv.join(" "), verb, problem }
}

/// Kills and reaps the command however its run ends.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the command with something to read; gives what it wrote.
fn run(
    argv: &[String],
    verb: &'static str,
    id: &str,
    input: &[u8],
) -> Result<Zeroizing<Vec<u8>>, WrapError> {
    let failed = |problem: String| failure(argv, verb, problem);
    let (program, first) = argv.split_first().ok_or_else(|| failed("no command".to_owned()))?;
    let spawned = Command::new(program)
        .args(first)
        .args([verb, id])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn();
    let mut child = Owned(spawned.map_err(|e| failed(e.to_string()))?);
    let (stdin, stdout) = (child.0.stdin.take(), child.0.stdout.take());
    let (done, result) = std::sync::mpsc::sync_channel(1);
    let input = Zeroizing::new(input.to_vec());
    // On a thread: neither side may be waited for without an end.
    let talk = move || {
        let mut output = Zeroizing::new(Vec::new());
        let work = || -> io::Result<()> {
            if let Some(mut stdin) = stdin {
                // One that does not read its input may still know the answer.
                let _ = stdin.write_all(&input);
            }
            if let Some(stdout) = stdout {
                stdout.take(MAX_WRAPPED).read_to_end(&mut output)?;
            }
            Ok(())
        };
        let outcome = work();
        // Nobody waits any more when the deadline came first.
        let _ = done.send(outcome.map(|()| output));
    };
    let started = std::thread::Builder::new().name("key-command".to_owned()).spawn(talk);
    started.map_err(|e| failed(e.to_string()))?;
    let output = result
        .recv_timeout(COMMAND_DEADLINE)
        .map_err(|_| failed(format!("no answer within {COMMAND_DEADLINE:?}")))?;
    let output = output.map_err(|e| failed(e.to_string()))?;
    // Its output has ended; a command that goes on all the same has nothing more to say.
    let status = wait(&mut child.0).map_err(|e| failed(e.to_string()))?;
    if !status.is_some_and(|s| s.success()) || output.is_empty() {
        let how = status.map_or_else(|| "it does not end".to_owned(), |s| s.to_string());
        return Err(failed(format!("{how}, {} bytes written", output.len())));
    }
    Ok(output)
}

/// The end of a process that has closed its output; `None` when it does not come.
fn wait(child: &mut Child) -> io::Result<Option<std::process::ExitStatus>> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    let pid = Pid::from_raw(child.id().cast_signed()).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec { tv_sec: 5, tv_nsec: 0 };
    let mut gone = [PollFd::new(&pidfd, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut gone, Some(&limit)))?;
    child.try_wait()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(dir: &Path, text: &str) -> MasterKey {
        let path = dir.join("kms");
        std::fs::write(&path, text).unwrap();
        MasterKey::Command(vec!["sh".to_owned(), path.display().to_string()])
    }

    #[test]
    fn a_command_wraps_and_unwraps() {
        let dir = tempfile::tempdir().unwrap();
        // Turns each digit into another one, and back: enough to see that it was asked.
        let turn = "tr 0123456789abcdef fedcba9876543210";
        let master = script(dir.path(), &format!("test \"$2\" = the-id || exit 3\n{turn}"));
        let key = Key::generate().unwrap();
        let wrapped = master.wrap("the-id", &key).unwrap();
        let turned: Vec<u8> = key.expose().iter().map(|byte| !byte).collect();
        assert_eq!(wrapped.trim_ascii(), hex::encode(turned).as_bytes());
        assert_eq!(master.unwrap("the-id", &wrapped).unwrap().expose(), key.expose());
        let said = master.unwrap("another", &wrapped).unwrap_err().to_string();
        assert!(said.contains("unwrap") && said.contains("exit status: 3"), "{said}");
    }

    #[test]
    fn a_command_that_fails_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key::generate().unwrap();
        for (text, wanted) in [("exit 0", "0 bytes"), ("echo some; exit 1", "exit status: 1")] {
            let said = script(dir.path(), text).wrap("id", &key).unwrap_err().to_string();
            assert!(said.contains(wanted), "{said}");
        }
        let said = script(dir.path(), "echo nonsense").unwrap("id", b"x").unwrap_err().to_string();
        assert!(said.contains("64 hex digits"), "{said}");
        let none = MasterKey::Command(vec!["/nowhere/kms".to_owned()]);
        assert!(none.wrap("id", &key).unwrap_err().to_string().contains("/nowhere/kms"));
    }

    #[test]
    fn a_file_without_a_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master");
        std::fs::write(&path, "too short").unwrap();
        let said = MasterKey::from_file(&path).unwrap_err().to_string();
        assert!(said.contains("64 hex digits"), "{said}");
    }
}
