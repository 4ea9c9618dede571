//! Does KVM on this host really run guests?
//!
//! That `/dev/kvm` opens says little: there are hosts where it opens, makes VMs and then interprets
//! guest kernel code a thousand times slower than hardware would run it, with instructions missing.
//! So [`probe`] runs some million instructions of guest kernel code in a child process
//! (`rethaw-kvm-probe`), which it kills when a time limit passes.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};

/// Hardware runs the probe's loop at more than 1000 million instructions per second, also inside
/// another VM; at less than this a Linux guest would boot for minutes.
const MIN_INSTRUCTIONS_PER_SECOND: u64 = 100_000_000;

/// How long [`probe`] may take. On working hardware it takes some ten milliseconds.
pub const TIME_LIMIT: Duration = Duration::from_secs(3);

/// What KVM is good for here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum KvmVerdict {
    /// There is no `/dev/kvm`.
    Absent,
    /// It is there and this process may not use it.
    NotPermitted {
        /// The system's reason.
        reason: String,
    },
    /// It cannot run guest kernel code.
    Broken {
        /// What happened.
        reason: String,
    },
    /// It runs guest kernel code far slower than hardware does.
    Slow {
        /// Measured speed.
        instructions_per_second: u64,
        /// What else went wrong, if anything.
        also: Option<String>,
    },
    /// It runs guest kernel code at the speed of hardware.
    Works {
        /// Measured speed.
        instructions_per_second: u64,
    },
}

/// What [`probe`] found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmReport {
    /// The verdict.
    #[serde(flatten)]
    pub verdict: KvmVerdict,
    /// Whether the CPU shows `vmx` or `svm`. Without, a `/dev/kvm` is not hardware's.
    pub hardware_flag: bool,
}

impl KvmReport {
    /// Whether Linux guests boot.
    pub fn boots_linux(&self) -> bool {
        matches!(self.verdict, KvmVerdict::Works { .. })
    }
}

impl std::fmt::Display for KvmReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let million = |n: &u64| *n as f64 / 1e6;
        match &self.verdict {
            KvmVerdict::Absent => f.write_str("absent: there is no /dev/kvm"),
            KvmVerdict::NotPermitted { reason } => write!(f, "not permitted: /dev/kvm: {reason}"),
            KvmVerdict::Broken { reason } => write!(f, "does not boot Linux: {reason}"),
            KvmVerdict::Slow { instructions_per_second, also } => {
                write!(
                    f,
                    "does not boot Linux: runs guest kernel code at only {:.1} million \
                     instructions/s",
                    million(instructions_per_second)
                )?;
                also.as_ref().map_or(Ok(()), |also| write!(f, ", and {also}"))
            }
            KvmVerdict::Works { instructions_per_second } => write!(
                f,
                "works: {:.0} million guest instructions/s",
                million(instructions_per_second)
            ),
        }?;
        let here = !matches!(self.verdict, KvmVerdict::Absent | KvmVerdict::Works { .. });
        if here && !self.hardware_flag {
            f.write_str(" (the CPU shows neither vmx nor svm: this KVM is paravirtual)")?;
        }
        Ok(())
    }
}

/// Where the child's program is: beside the running one, or where a package puts it.
pub fn helper_path() -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    // Test programs are one folder deeper than the programs they test.
    own.ancestors()
        .skip(1)
        .take(2)
        .chain([Path::new("/usr/lib/rethaw")])
        .map(|dir| dir.join("rethaw-kvm-probe"))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("rethaw-kvm-probe should be beside {}", own.display()),
            )
        })
}

/// Finds out whether KVM runs guests here, with `helper` as the child's program, in at most
/// `limit`. The only error is that the child could not be started.
pub async fn probe(helper: &Path, limit: Duration) -> io::Result<KvmReport> {
    let hardware_flag = hardware_flag();
    let report = |verdict| Ok(KvmReport { verdict, hardware_flag });
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return report(KvmVerdict::Absent),
        Err(e) => return report(KvmVerdict::NotPermitted { reason: e.to_string() }),
    }
    let mut child = tokio::process::Command::new(helper)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", helper.display())))?;
    let mut progress = Progress::default();
    if let Some(stdout) = child.stdout.take() {
        let mut lines = BufReader::new(stdout).lines();
        let read = async {
            while let Ok(Some(line)) = lines.next_line().await {
                progress.take(&line);
            }
        };
        progress.in_time = tokio::time::timeout(limit, read).await.is_ok();
    }
    // Killed whether it is done or not; a vCPU in KVM_RUN ends by it too.
    let _ = tokio::time::timeout(limit, child.kill()).await;
    report(progress.verdict(limit))
}

/// One line of the child's.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", tag = "step")]
enum Step {
    Created,
    Speed { instructions: u64, micros: u64 },
    KernelInstructions,
    Error { message: String },
}

#[derive(Default)]
struct Progress {
    created: bool,
    instructions_per_second: Option<u64>,
    kernel_instructions: bool,
    error: Option<String>,
    in_time: bool,
}

impl Progress {
    fn take(&mut self, line: &str) {
        match serde_json::from_str(line) {
            Ok(Step::Created) => self.created = true,
            Ok(Step::Speed { instructions, micros }) => {
                let per_second = u128::from(instructions) * 1_000_000 / u128::from(micros.max(1));
                self.instructions_per_second = Some(per_second as u64);
            }
            Ok(Step::KernelInstructions) => self.kernel_instructions = true,
            Ok(Step::Error { message }) => self.error = Some(message),
            Err(e) => self.error = Some(format!("the probe said {line:?}: {e}")),
        }
    }

    fn verdict(self, limit: Duration) -> KvmVerdict {
        let also = match (self.error, self.in_time, self.kernel_instructions) {
            (Some(e), _, _) => Some(e),
            (None, false, _) => Some(format!("the probe was not done after {limit:?}")),
            (None, true, false) => Some("the probe ended early".to_owned()),
            (None, true, true) => None,
        };
        match (self.instructions_per_second, also) {
            (Some(speed), also) if speed < MIN_INSTRUCTIONS_PER_SECOND => {
                KvmVerdict::Slow { instructions_per_second: speed, also }
            }
            (Some(speed), None) => KvmVerdict::Works { instructions_per_second: speed },
            (Some(speed), Some(reason)) => KvmVerdict::Broken {
                reason: format!("{reason} (after {speed} guest instructions/s)"),
            },
            (None, reason) => KvmVerdict::Broken {
                reason: format!(
                    "no guest code ran{}: {}",
                    if self.created { "" } else { ", no VM could be made" },
                    reason.unwrap_or_default()
                ),
            },
        }
    }
}

fn hardware_flag() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| {
        text.lines()
            .filter(|l| l.starts_with("flags"))
            .any(|l| l.split_ascii_whitespace().any(|f| f == "vmx" || f == "svm"))
    })
}

#[cfg(test)]
mod tests;
