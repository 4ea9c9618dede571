//! `rethaw serve`: from flags, environment and file to [`ServeOptions`], which the service runs on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use snapshotter::image::Flavor;

use super::home;
use super::network::NetworkArgs;
use super::serve_file::ServeFile;
use crate::engine::configured::Configured;
use crate::engine::keys::Quotas;
use crate::listen::TlsFiles;

/// Where the service listens when nothing else is said.
const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 7070);
/// Memory of a guest when nothing else is said.
const DEFAULT_MEMORY_MIB: u64 = 512;

/// The longest life time a sandbox may ask for when nothing else is said; more cannot be said.
pub const MAX_TIMEOUT: u64 = 30 * 24 * 3600;

/// More parked VMs than this are a typing error, not a plan.
const MAX_POOL_TARGET: u32 = 1000;

/// What the service is started with, checked and complete.
#[derive(Debug, Clone, PartialEq)]
pub struct ServeOptions {
    /// Addresses of the API.
    pub listen: Vec<SocketAddr>,
    /// Unix socket of the API.
    pub unix_socket: Option<PathBuf>,
    /// Certificate for `listen`.
    pub tls: Option<TlsFiles>,
    /// Folder of images, snapshots, database and key file.
    pub home: PathBuf,
    /// Parked VMs to keep of a template without a target of its own; the service's default when
    /// absent.
    pub pool_target: Option<u32>,
    /// Targets of single templates, where no operator has set one.
    pub pools: BTreeMap<String, u32>,
    /// How much all sandboxes together may have.
    pub limits: Quotas,
    /// The largest target a pool may be given.
    pub max_pool_target: u32,
    /// The longest life time a sandbox may ask for.
    pub max_timeout: Duration,
    /// Which VMM to use.
    pub vmm: VmmChoice,
    /// Memory of a guest of the `base` template.
    pub memory_mib: u64,
    /// Kernel of the `base` template.
    pub flavor: Flavor,
    /// Answer without an API key. Only ever true when every address in `listen` is a loopback one.
    pub no_auth: bool,
    /// Sandboxes outlive a stop of the service.
    pub keep_vms: bool,
    /// Paused workspaces are written in the clear.
    pub no_encryption: bool,
    /// No thread is a real-time one.
    pub no_real_time: bool,
    /// File of the master key that wraps the keys of workspaces.
    pub master_key_file: Option<PathBuf>,
    /// Command that wraps and unwraps them instead, split at white space.
    pub key_command: Option<String>,
    /// Templates whose clones map the memory file.
    pub file_backed: BTreeSet<String>,
    /// Put working sets in place ahead of demand.
    pub working_sets: bool,
    /// Age at which all memory of a sandbox is put in place.
    pub graduate_after_seconds: Option<u64>,
    /// Networks of sandboxes.
    pub network: NetworkArgs,
    /// What snapshots and uploads may take on disk; as much as there is when absent.
    pub disk_budget_bytes: Option<u64>,
    /// Templates to have, each behind the one it starts from.
    pub templates: Vec<Configured>,
}

/// Which VMM the service uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmChoice {
    /// Firecracker where KVM really works, QEMU elsewhere.
    #[default]
    Auto,
    /// QEMU's microvm machine, with KVM where it works.
    Qemu,
    /// Firecracker; refused where KVM does not work.
    Firecracker,
}

/// The kernels there are, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FlavorChoice {
    /// The distribution's cloud kernel with a small initramfs.
    Default,
    /// A kernel tuned for the VMM's few devices.
    Min,
}

impl From<FlavorChoice> for Flavor {
    fn from(choice: FlavorChoice) -> Self {
        match choice {
            FlavorChoice::Default => Self::Default,
            FlavorChoice::Min => Self::Min,
        }
    }
}

/// Flags of `rethaw serve`. A flag left out is looked for in the file, then takes its default.
#[derive(Debug, Default, Args)]
#[command(after_help = "Examples:
  rethaw serve
  rethaw serve --listen 127.0.0.1:8080 --home ~/rethaw --pool-target 8
  rethaw serve --config /etc/rethaw.toml

The first start makes the template `base`, which takes some minutes; /readyz says how far it is.
A flag wins over the environment, that over the file. Related: doctor, template, pool.")]
pub struct ServeArgs {
    /// Address of the API; may be given several times [default: 127.0.0.1:7070]
    #[arg(long, env = "RETHAW_LISTEN", value_name = "ADDR", value_delimiter = ',')]
    pub listen: Vec<SocketAddr>,

    /// Unix socket of the API; without --listen, in place of the default address
    #[arg(long, env = "RETHAW_UNIX_SOCKET", value_name = "PATH")]
    pub unix_socket: Option<PathBuf>,

    /// Speak TLS with this certificate chain (PEM); SIGHUP reads it again
    #[arg(long, env = "RETHAW_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// Private key of the certificate (PEM)
    #[arg(long, env = "RETHAW_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// Folder of images, snapshots, database and key file
    /// [default: /var/lib/rethaw as root, else $XDG_DATA_HOME/rethaw]
    #[arg(long, env = "RETHAW_HOME", value_name = "DIR")]
    pub home: Option<PathBuf>,

    /// Parked VMs to keep of each template
    #[arg(long, env = "RETHAW_POOL_TARGET", value_name = "N")]
    pub pool_target: Option<u32>,

    /// VMM to use [default: auto]
    #[arg(long, env = "RETHAW_VMM", value_enum)]
    pub vmm: Option<VmmChoice>,

    /// Memory of a guest of the base template, in MiB [default: 512]
    #[arg(long, env = "RETHAW_MEMORY_MIB", value_name = "MIB",
          value_parser = clap::value_parser!(u64).range(MEMORY_MIB))]
    pub memory_mib: Option<u64>,

    /// Kernel of the base template [default: default]
    #[arg(long, env = "RETHAW_FLAVOR", value_enum)]
    pub flavor: Option<FlavorChoice>,

    /// Templates whose clones map the memory file instead of getting pages from the page server;
    /// under QEMU they cannot be paused or forked. See docs/performance.md for what either costs
    #[arg(long, env = "RETHAW_FILE_BACKED", value_name = "NAME", value_delimiter = ',')]
    pub file_backed: Option<Vec<String>>,

    /// Do not put the pages that clones ask for first in place ahead of demand; for comparison
    #[arg(long)]
    pub no_working_sets: bool,

    /// Age at which all memory of a sandbox is put in place, so that it no longer needs the page
    /// server; every page then costs memory [default: never]
    #[arg(long, env = "RETHAW_GRADUATE_AFTER_SECONDS", value_name = "SECONDS")]
    pub graduate_after_seconds: Option<u64>,

    /// What templates, paused sandboxes and uploads may take on disk, in MiB [default: no limit]
    #[arg(long, env = "RETHAW_DISK_BUDGET_MIB", value_name = "MIB")]
    pub disk_budget_mib: Option<u64>,

    /// TOML file with the same settings and more; docs/operations.md describes it
    #[arg(long, env = "RETHAW_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Answer without an API key; only together with a loopback address
    #[arg(long)]
    pub insecure_no_auth: bool,

    /// Let sandboxes run on when the service stops; the next one takes them back
    #[arg(long, env = "RETHAW_KEEP_VMS", num_args = 0..=1, default_missing_value = "true",
          value_name = "BOOL", require_equals = true)]
    pub keep_vms: Option<bool>,

    /// Schedule the service, and VMs while they are handed over, as any other process
    #[arg(long)]
    pub no_real_time: bool,

    /// Write paused workspaces in the clear
    #[arg(long)]
    pub no_encryption: bool,

    /// Master key that wraps the keys of paused workspaces, 64 hex digits; made when it is not there
    /// [default: <home>/master-key]
    #[arg(long, env = "RETHAW_MASTER_KEY_FILE", value_name = "FILE")]
    pub master_key_file: Option<PathBuf>,

    /// Command that wraps and unwraps those keys instead: `COMMAND wrap|unwrap ID`, from standard
    /// input to standard output
    #[arg(
        long,
        env = "RETHAW_KEY_COMMAND",
        value_name = "COMMAND",
        conflicts_with = "master_key_file"
    )]
    pub key_command: Option<String>,

    #[command(flatten)]
    pub network: NetworkArgs,
}

/// Guests smaller than this do not boot, larger ones are surely a slip of the unit.
pub const MEMORY_MIB: std::ops::RangeInclusive<u64> = 128..=1_048_576;

/// Why the service cannot be started like this.
#[derive(Debug, thiserror::Error)]
pub enum ServeArgsError {
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] super::serve_file::ServeFileError),
    /// No folder to keep anything in.
    #[error(transparent)]
    Home(#[from] home::HomeError),
    /// A certificate without its key, or the other way round.
    #[error("TLS needs both a certificate and its key: --tls-cert and --tls-key")]
    HalfTls,
    /// Open to the network, and open to everybody.
    #[error(
        "--insecure-no-auth with {0}: anybody on that network could run code here; \
         listen on a loopback address or keep the key"
    )]
    OpenToAll(SocketAddr),
}

impl ServeArgs {
    /// Reads the file, if there is one, and settles every option: flag, environment, file, default.
    pub fn resolve(self) -> Result<ServeOptions, ServeArgsError> {
        let (file, templates) = match &self.config {
            Some(path) => {
                let mut file = ServeFile::read(path)?;
                let templates = file.take_templates(path)?;
                (file, templates)
            }
            None => Default::default(),
        };
        let unix_socket = self.unix_socket.or(file.unix_socket);
        let mut listen = if self.listen.is_empty() { file.listen } else { self.listen };
        if listen.is_empty() && unix_socket.is_none() {
            listen.push(DEFAULT_LISTEN);
        }
        let open = listen.iter().find(|address| !address.ip().is_loopback());
        if let (true, Some(open)) = (self.insecure_no_auth, open) {
            return Err(ServeArgsError::OpenToAll(*open));
        }
        let tls = file.tls.unwrap_or_default();
        let tls = match (self.tls_cert.or(tls.cert), self.tls_key.or(tls.key)) {
            (Some(cert), Some(key)) => Some(TlsFiles { cert, key }),
            (None, None) => None,
            _ => return Err(ServeArgsError::HalfTls),
        };
        let home = match self.home.or(file.home) {
            Some(dir) => dir,
            None => home::default_home()?,
        };
        Ok(ServeOptions {
            listen,
            unix_socket,
            tls,
            home,
            pools: file.pools,
            max_timeout: Duration::from_secs(file.limits.timeout_seconds.unwrap_or(MAX_TIMEOUT)),
            max_pool_target: file.limits.pool_target.unwrap_or(MAX_POOL_TARGET),
            limits: file.limits.quotas(),
            pool_target: self.pool_target.or(file.pool_target),
            vmm: self.vmm.or(file.vmm).unwrap_or_default(),
            memory_mib: self.memory_mib.or(file.memory_mib).unwrap_or(DEFAULT_MEMORY_MIB),
            flavor: self.flavor.or(file.flavor).map_or(Flavor::Default, Flavor::from),
            no_auth: self.insecure_no_auth,
            keep_vms: self.keep_vms.or(file.keep_vms).unwrap_or_default(),
            no_real_time: self.no_real_time,
            no_encryption: self.no_encryption,
            master_key_file: self.master_key_file.or(file.master_key_file),
            key_command: self.key_command.or(file.key_command),
            file_backed: self.file_backed.or(file.file_backed).into_iter().flatten().collect(),
            working_sets: !self.no_working_sets,
            graduate_after_seconds: self.graduate_after_seconds.or(file.graduate_after_seconds),
            network: self.network.or(file.network),
            templates,
            disk_budget_bytes: self
                .disk_budget_mib
                .or(file.disk_budget_mib)
                .map(|mib| mib.saturating_mul(1 << 20)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Serve {
        #[command(flatten)]
        args: ServeArgs,
    }

    /// What these flags come to, with this file.
    fn resolve(flags: &[&str], file: &str) -> Result<ServeOptions, ServeArgsError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rethaw.toml");
        std::fs::write(&path, file).unwrap();
        let mut args = vec!["serve", "--home", "/h", "--config", path.to_str().unwrap()];
        args.extend(flags);
        <Serve as clap::Parser>::try_parse_from(args).unwrap().args.resolve()
    }

    #[test]
    fn a_flag_beats_the_file_and_that_the_default() {
        let default = resolve(&[], "").unwrap();
        assert_eq!(default.listen, [DEFAULT_LISTEN]);
        assert!(!default.keep_vms && default.tls.is_none());
        let file = "listen = \"127.0.0.1:1\"\nkeep_vms = true\nmemory_mib = 256\n";
        let from_file = resolve(&[], file).unwrap();
        assert_eq!(from_file.listen, ["127.0.0.1:1".parse().unwrap()]);
        assert!(from_file.keep_vms && from_file.memory_mib == 256);
        let flags = ["--listen", "127.0.0.1:2", "--listen", "[::1]:3", "--keep-vms=false"];
        let from_flags = resolve(&flags, file).unwrap();
        assert_eq!(from_flags.listen.len(), 2);
        assert!(!from_flags.keep_vms);
        let unix = resolve(&["--unix-socket", "/run/r.sock"], "").unwrap();
        assert!(unix.listen.is_empty(), "a socket is enough");
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let half = resolve(&["--tls-cert", "/c"], "");
        assert!(matches!(half, Err(ServeArgsError::HalfTls)));
        let whole = resolve(&["--tls-cert", "/c"], "[tls]\nkey = \"/k\"\n").unwrap();
        assert_eq!(whole.tls.unwrap().key, std::path::Path::new("/k"));
        let listen = ["--insecure-no-auth", "--listen", "127.0.0.1:1", "--listen", "0.0.0.0:1"];
        assert!(matches!(resolve(&listen, ""), Err(ServeArgsError::OpenToAll(_))));
        assert!(resolve(&["--insecure-no-auth"], "").unwrap().no_auth);
    }
}
