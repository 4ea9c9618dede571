//! Finding Firecracker's programs and asking them what they are.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use super::version::{UnsupportedVersion, Version};

/// Both only print something and exit.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why there is no Firecracker to use.
#[derive(Debug, thiserror::Error)]
pub enum BinariesError {
    /// None is installed.
    #[error("no Firecracker in {}; scripts/get-firecracker puts one there", .0.display())]
    NotInstalled(PathBuf),
    /// Only such that cannot be used are installed.
    #[error(transparent)]
    Unsupported(#[from] UnsupportedVersion),
    /// It did not say what it is.
    #[error("{} {argument}: {message}", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// What it was asked.
        argument: &'static str,
        /// What happened.
        message: String,
    },
}

/// Firecracker and its jailer, of one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    /// `firecracker`.
    pub firecracker: PathBuf,
    /// `jailer`.
    pub jailer: PathBuf,
}

/// What the installed Firecracker is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its version, which is a supported one.
    pub version: Version,
    /// Version of its snapshot format.
    pub snapshot_format: String,
}

impl Binaries {
    /// Both programs in one folder.
    pub fn in_dir(dir: &Path) -> Self {
        Self { firecracker: dir.join("firecracker"), jailer: dir.join("jailer") }
    }

    /// The newest supported version under `<home>/firecracker/`, where each has a folder named after
    /// it.
    pub fn find(home: &Path) -> Result<Self, BinariesError> {
        let base = home.join("firecracker");
        let mut versions: Vec<Version> = std::fs::read_dir(&base)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.path().join("firecracker").is_file())
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        versions.sort();
        let newest = *versions.last().ok_or_else(|| BinariesError::NotInstalled(base.clone()))?;
        let supported = versions.into_iter().rev().find(|v| v.check_supported().is_ok());
        match supported {
            Some(version) => Ok(Self::in_dir(&base.join(version.to_string()))),
            None => Err(newest
                .check_supported()
                .map_or_else(BinariesError::Unsupported, |()| BinariesError::NotInstalled(base))),
        }
    }

    /// Asks the program what it is, and refuses versions that are not supported.
    pub async fn identify(&self) -> Result<Identity, BinariesError> {
        let text = ask(&self.firecracker, "--version").await?;
        let first = text.lines().next().unwrap_or_default();
        let word = first.split_whitespace().last().unwrap_or_default();
        let version: Version =
            word.parse().map_err(|e: super::version::NotAVersion| BinariesError::Run {
                program: self.firecracker.clone(),
                argument: "--version",
                message: e.to_string(),
            })?;
        version.check_supported()?;
        let text = ask(&self.firecracker, "--snapshot-version").await?;
        let snapshot_format = text.lines().next().unwrap_or_default().trim().to_owned();
        Ok(Identity { version, snapshot_format })
    }
}

async fn ask(program: &Path, argument: &'static str) -> Result<String, BinariesError> {
    let err = |message| BinariesError::Run { program: program.to_owned(), argument, message };
    let run = Command::new(program).arg(argument).env_clear().kill_on_drop(true).output();
    let output = tokio::time::timeout(DEADLINE, run)
        .await
        .map_err(|_| err(format!("no answer within {DEADLINE:?}")))?
        .map_err(|e| err(e.to_string()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(err(format!("{}: {}", output.status, text.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(home: &Path, version: &str) {
        let dir = home.join("firecracker").join(version);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("firecracker"), "").unwrap();
    }

    #[test]
    fn the_newest_supported_version_is_found() {
        let home = tempfile::tempdir().unwrap();
        let missing = Binaries::find(home.path()).unwrap_err();
        assert!(missing.to_string().contains("get-firecracker"), "{missing}");
        install(home.path(), "1.16.0");
        let refused = Binaries::find(home.path()).unwrap_err();
        assert!(refused.to_string().contains("vsock"), "{refused}");
        install(home.path(), "1.12.1");
        install(home.path(), ".get.123");
        let found = Binaries::find(home.path()).unwrap();
        assert_eq!(found, Binaries::in_dir(&home.path().join("firecracker/1.12.1")));
        install(home.path(), "1.16.2");
        let found = Binaries::find(home.path()).unwrap();
        assert_eq!(found, Binaries::in_dir(&home.path().join("firecracker/1.16.2")));
    }
}
