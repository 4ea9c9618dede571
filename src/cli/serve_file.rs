//! The TOML file of `rethaw serve --config`.
//!
//! ```toml
//! listen = "127.0.0.1:7070"
//! home = "/var/lib/rethaw"
//! pool_target = 8
//! vmm = "qemu"            # auto, qemu, firecracker
//! memory_mib = 512
//! flavor = "default"      # default, min
//! master_key_file = "/etc/rethaw/master-key"
//! # or: key_command = "/usr/local/bin/kms-wrap --key rethaw"
//! file_backed = ["base"]  # templates whose clones map the memory file
//! graduate_after_seconds = 3600
//! disk_budget_mib = 20000
//!
//! [network]
//! mode = "auto"           # auto, on, off
//! range = "10.231.0.0/16"
//! dns = ["192.0.2.53"]
//! deny_egress = ["192.168.0.0/16"]
//! domain = "box.example.com"
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::network::NetworkArgs;
use super::serve::{FlavorChoice, MEMORY_MIB, VmmChoice};

/// What the file may say; everything is optional, and a name it does not know is an error.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeFile {
    /// Address of the API.
    pub listen: Option<SocketAddr>,
    /// Home folder.
    pub home: Option<PathBuf>,
    /// Parked VMs of each template.
    pub pool_target: Option<u32>,
    /// VMM to use.
    pub vmm: Option<VmmChoice>,
    /// Memory of a guest.
    pub memory_mib: Option<u64>,
    /// Kernel of the base template.
    pub flavor: Option<FlavorChoice>,
    /// Master key that wraps the keys of workspaces.
    pub master_key_file: Option<PathBuf>,
    /// Command that wraps them instead.
    pub key_command: Option<String>,
    /// Templates whose clones map the memory file.
    pub file_backed: Option<Vec<String>>,
    /// Age at which all memory of a sandbox is put in place.
    pub graduate_after_seconds: Option<u64>,
    /// Networks of sandboxes.
    #[serde(default)]
    pub network: NetworkArgs,
    /// What the store may take on disk.
    pub disk_budget_mib: Option<u64>,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ServeFileError {
    /// It cannot be read.
    #[error("configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("configuration file {}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        message: String,
    },
}

impl ServeFile {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ServeFileError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ServeFileError::Read { path: path.to_owned(), source })?;
        Self::parse(&text)
            .map_err(|message| ServeFileError::Parse { path: path.to_owned(), message })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let file: Self = toml::from_str(text).map_err(|e| e.to_string().trim_end().to_owned())?;
        if let Some(mib) = file.memory_mib.filter(|mib| !MEMORY_MIB.contains(mib)) {
            return Err(format!(
                "memory_mib is {mib}; it must be {} to {}",
                MEMORY_MIB.start(),
                MEMORY_MIB.end()
            ));
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_settings_are_read() {
        let text = "listen = \"0.0.0.0:80\"\nhome = \"/srv\"\npool_target = 8\n\
                    vmm = \"qemu\"\nmemory_mib = 256\nflavor = \"min\"\nfile_backed = [\"base\"]\n\
                    [network]\nmode = \"off\"\nrange = \"10.9.0.0/16\"\n";
        let file = ServeFile::parse(text).unwrap();
        assert_eq!(file.listen, Some("0.0.0.0:80".parse().unwrap()));
        assert_eq!(file.home, Some("/srv".into()));
        assert_eq!(file.pool_target, Some(8));
        assert_eq!(file.vmm, Some(VmmChoice::Qemu));
        assert_eq!(file.memory_mib, Some(256));
        assert_eq!(file.flavor, Some(FlavorChoice::Min));
        assert_eq!(file.file_backed, Some(vec!["base".to_owned()]));
        assert_eq!(file.network.range, Some([10, 9, 0, 0].into()));
    }

    #[test]
    fn a_slip_is_named_with_its_place() {
        let error = ServeFile::parse("pool_size = 8\n").unwrap_err();
        assert!(error.contains("line 1") && error.contains("pool_size"), "{error}");
        let error = ServeFile::parse("memory_mib = 4\n").unwrap_err();
        assert!(error.contains("memory_mib is 4"), "{error}");
    }
}
