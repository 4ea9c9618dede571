//! The TOML file of `rethaw serve --config`. Everything in it is optional; a name it does not know is
//! an error. `packaging/rethaw.toml` shows every setting with its default.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};

use super::network::NetworkArgs;
use super::serve::{FlavorChoice, MAX_TIMEOUT, MEMORY_MIB, VmmChoice};
use super::serve_templates::{self, TemplateTable, TemplatesError};
use crate::engine::configured::Configured;
use crate::engine::keys::Quotas;

/// What the file may say.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeFile {
    /// Addresses of the API: one, or a list.
    #[serde(default, deserialize_with = "one_or_many")]
    pub listen: Vec<SocketAddr>,
    /// Unix socket of the API.
    pub unix_socket: Option<PathBuf>,
    /// Certificate for `listen`.
    pub tls: Option<TlsTable>,
    /// Home folder.
    pub home: Option<PathBuf>,
    /// Parked VMs of each template.
    pub pool_target: Option<u32>,
    /// The same for single templates.
    #[serde(default)]
    pub pools: BTreeMap<String, u32>,
    /// How much all sandboxes together may have.
    #[serde(default)]
    pub limits: LimitsTable,
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
    /// Sandboxes outlive a stop of the service.
    pub keep_vms: Option<bool>,
    /// Templates to have.
    #[serde(default)]
    pub templates: Vec<TemplateTable>,
}

/// `[tls]`
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsTable {
    /// Certificate chain, PEM.
    pub cert: Option<PathBuf>,
    /// Its private key, PEM.
    pub key: Option<PathBuf>,
}

/// `[limits]`
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsTable {
    sandboxes: Option<u32>,
    vcpus: Option<u32>,
    memory_mib: Option<u64>,
    disk_mib: Option<u64>,
    claims_per_second: Option<f64>,
    /// The largest target a pool may be given.
    pub pool_target: Option<u32>,
    /// The longest life time a sandbox may ask for.
    pub timeout_seconds: Option<u64>,
}

impl LimitsTable {
    /// As the engine takes them.
    pub fn quotas(&self) -> Quotas {
        let bytes = |mib: Option<u64>| mib.map(|mib| mib.saturating_mul(1 << 20));
        Quotas {
            sandboxes: self.sandboxes,
            vcpus: self.vcpus,
            memory_bytes: bytes(self.memory_mib),
            disk_bytes: bytes(self.disk_mib),
            claims_per_second: self.claims_per_second,
        }
    }
}

fn one_or_many<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<SocketAddr>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "an address like \"127.0.0.1:7070\", or a list of them")]
    enum Listen {
        One(SocketAddr),
        Many(Vec<SocketAddr>),
    }
    Ok(match Listen::deserialize(from)? {
        Listen::One(address) => vec![address],
        Listen::Many(addresses) => addresses,
    })
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
    /// One of its templates cannot be made.
    #[error("configuration file {}: {source}", path.display())]
    Templates {
        /// The file.
        path: PathBuf,
        /// Which field, and why.
        source: TemplatesError,
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

    /// Its templates, in the order in which they can be made, with all that they copy. `path` is
    /// where the file is: what they copy is beside it.
    pub fn take_templates(&mut self, path: &Path) -> Result<Vec<Configured>, ServeFileError> {
        let tables = std::mem::take(&mut self.templates);
        let dir = path.parent().unwrap_or(Path::new("."));
        serve_templates::resolve(tables, dir, &mut self.pools)
            .map_err(|source| ServeFileError::Templates { path: path.to_owned(), source })
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
        let longest = file.limits.timeout_seconds.unwrap_or(MAX_TIMEOUT);
        if !(1..=MAX_TIMEOUT).contains(&longest) {
            let name = "limits.timeout_seconds";
            return Err(format!("{name} is {longest}; it must be 1 to {MAX_TIMEOUT}"));
        }
        if let Some(rate) =
            file.limits.claims_per_second.filter(|rate| rate.is_nan() || *rate <= 0.0)
        {
            return Err(format!("limits.claims_per_second is {rate}; it must be above 0"));
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file that comes with the package, with every setting switched on.
    fn example() -> String {
        let text = include_str!("../../packaging/rethaw.toml");
        fn setting(line: &str) -> Option<&str> {
            let line = line.strip_prefix('#')?;
            line.starts_with(|c: char| c.is_ascii_lowercase() || c == '[').then_some(line)
        }
        let lines = text.lines().map(|line| setting(line).unwrap_or(line));
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_example_shows_every_setting() {
        let file = ServeFile::parse(&example()).unwrap();
        let said = format!("{file:?}");
        assert!(!said.contains("None") && !said.contains("[]") && !said.contains("{}"), "{said}");
        assert_eq!(file.limits.quotas().memory_bytes, Some(16 << 30));
        assert_eq!(
            ServeFile::parse(include_str!("../../packaging/rethaw.toml")).unwrap(),
            ServeFile { keep_vms: Some(true), ..ServeFile::default() }
        );
    }

    #[test]
    fn one_address_or_several() {
        let one = ServeFile::parse("listen = \"0.0.0.0:80\"").unwrap();
        assert_eq!(one.listen, ["0.0.0.0:80".parse().unwrap()]);
        let two = ServeFile::parse("listen = [\"127.0.0.1:80\", \"[::1]:80\"]").unwrap();
        assert_eq!(two.listen.len(), 2);
    }

    #[test]
    fn a_slip_is_named_with_its_place() {
        for (text, wanted) in [
            ("pool_size = 8\n", &["line 1", "pool_size"][..]),
            ("memory_mib = 4\n", &["memory_mib is 4"]),
            ("listen = \"everywhere\"\n", &["line 1", "an address like"]),
            ("[limits]\ncpus = 4\n", &["line 2", "cpus"]),
            ("[limits]\ntimeout_seconds = 0\n", &["limits.timeout_seconds is 0"]),
            ("[limits]\nclaims_per_second = 0\n", &["claims_per_second"]),
        ] {
            let error = ServeFile::parse(text).unwrap_err();
            assert!(wanted.iter().all(|w| error.contains(w)), "{text}: {error}");
        }
    }
}
