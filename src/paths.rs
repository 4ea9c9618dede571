//! Where the service's other binaries are: beside its own, or where a package puts them.

use std::path::{Path, PathBuf};

/// Directory of a Debian package's helper binaries.
const PACKAGED: &str = "/usr/lib/rethaw";

/// Binaries the service starts or hands on.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The page server.
    pub pager: PathBuf,
    /// Preload shim for QEMU.
    pub shim: PathBuf,
    /// Static guest agent.
    pub agent: PathBuf,
}

/// A binary that is missing.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// One of the service's own.
    #[error("{name} is neither in {beside:?} nor in {PACKAGED}: build it with `make`")]
    Own {
        /// The file.
        name: &'static str,
        /// Where the service's binary is.
        beside: PathBuf,
    },
    /// A program from a package.
    #[error("{name} is not in PATH: install it with `apt-get install {package}`")]
    Program {
        /// The program.
        name: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
}

impl Paths {
    /// Finds all of them.
    pub fn find() -> Result<Self, PathError> {
        let exe = std::env::current_exe().unwrap_or_default();
        let beside = exe.parent().map(Path::to_owned).unwrap_or_default();
        let own = |name: &'static str| {
            [beside.clone(), PathBuf::from(PACKAGED)]
                .into_iter()
                .map(|dir| dir.join(name))
                .find(|path| path.is_file())
                .ok_or(PathError::Own { name, beside: beside.clone() })
        };
        Ok(Self {
            pager: own("rethaw-pager")?,
            shim: own("librethaw_uffd_shim.so")?,
            agent: own("rethaw-agent-static")?,
        })
    }

    /// QEMU, where it is wanted.
    pub fn qemu(&self) -> Result<PathBuf, PathError> {
        let name = "qemu-system-x86_64";
        in_path(name).ok_or(PathError::Program { name, package: "qemu-system-x86" })
    }
}

/// Looks a program up in `PATH`.
pub fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|p| p.is_file())
}
