//! What a snapshot directory holds, and what must match before it may be loaded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::vmm::{Compat, MachineSize};

/// Name of the manifest in a snapshot directory. It is written last: a directory without it is
/// not a snapshot.
pub const MANIFEST: &str = "manifest.json";
/// Device state.
pub const VMSTATE: &str = "vmstate.bin";
/// Flat guest memory, sparse where it is zero.
pub const MEMORY: &str = "memory.bin";
/// Base name of a memory delta on the parent's memory.
pub const DELTA: &str = "memory.delta";
/// Base name of a delta on the parent's writable disk.
pub const DISK_DELTA: &str = "disk.delta";
/// What the key of an encrypted snapshot is used for in [`VMSTATE`].
pub const VMSTATE_PURPOSE: &str = "device state";
/// Pages a clone touches between resume and its first command.
pub const WORKING_SET: &str = "working-set.bin";
/// Which pages of [`MEMORY`] are zero.
pub const ZERO_MAP: &str = "zero-map.bin";
/// The writable disk, of the same instant as the memory.
pub const SCRATCH: &str = "scratch.img";

/// This crate's snapshot format. A snapshot of another format is refused.
pub const FORMAT: u32 = 2;

/// Snapshots that one snapshot can stand on, one on the other.
pub const MAX_CHAIN: usize = 16;

/// One file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Content digest, as [`crate::disk::describe`] defines it, in lower-case hex; of a delta's data
    /// the one of [`uffd_handler::source::DeltaSummary`].
    pub digest: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Bytes it really takes on disk.
    pub allocated_bytes: u64,
}

/// How long the golden VM took to come up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BootTimings {
    /// From starting the VMM to the agent's first reply.
    pub agent_ms: f64,
    /// Kernel time, as systemd reports it.
    pub kernel_ms: f64,
    /// User-space time to the default target, as systemd reports it.
    pub userspace_ms: f64,
    /// From starting the VMM to the default target reached with no job left.
    pub total_ms: f64,
    /// Settling.
    pub settle_ms: f64,
    /// Pause, device state, digests and publication.
    pub snapshot_ms: f64,
}

/// The manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Identifies the snapshot; also its directory's name.
    pub id: String,
    /// When it was made.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// The snapshot whose memory and disk this one is a delta on.
    pub parent: Option<String>,
    /// Size of the machine.
    pub size: MachineSize,
    /// What must match on restore.
    pub compat: Compat,
    /// Key of the guest image.
    pub image: String,
    /// Digests of the image files the guest was using: the shared base disk and the kernel.
    pub image_digests: BTreeMap<String, String>,
    /// Files by name.
    pub files: BTreeMap<String, FileEntry>,
    /// Names of this snapshot's own memory deltas, bottom first, on top of its parent's memory.
    #[serde(default)]
    pub memory_layers: Vec<String>,
    /// Names of its own disk deltas, bottom first, on top of its parent's disk; with none of them
    /// the disk is [`SCRATCH`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk_layers: Vec<String>,
    /// Name of the key that device state, memory and disk are encrypted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Sandboxes are made from it: it stays when none of them is left.
    #[serde(default)]
    pub template: bool,
    /// Variables that its sandboxes have.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Boot times, for a golden VM.
    pub boot: Option<BootTimings>,
    /// The identity the guest had at that instant; no clone may keep it.
    pub frozen_identity: FrozenIdentity,
}

/// Identity values present in the snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenIdentity {
    /// `/etc/machine-id`.
    pub machine_id: String,
    /// Hostname.
    pub hostname: String,
}

/// Why a snapshot cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The manifest cannot be read.
    #[error("cannot read snapshot manifest {path:?}: {source}")]
    Read {
        /// The manifest.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// The manifest is not one.
    #[error("snapshot manifest {path:?} is malformed: {source}")]
    Malformed {
        /// The manifest.
        path: PathBuf,
        /// What happened.
        source: serde_json::Error,
    },
    /// Another format.
    #[error("snapshot {id} has format {found}, this version reads format {FORMAT}: build it again")]
    Format {
        /// The snapshot.
        id: String,
        /// Its format.
        found: u32,
    },
    /// This host or VMM is not the one the snapshot was made for.
    #[error("snapshot {id} does not fit this host: {}", differences.join("; "))]
    Incompatible {
        /// The snapshot.
        id: String,
        /// Each difference.
        differences: Vec<String>,
    },
    /// What it stands on never ends.
    #[error("snapshot {id} stands on more than {MAX_CHAIN} others")]
    Chain {
        /// The snapshot.
        id: String,
    },
    /// A file is missing or has another length.
    #[error("snapshot {id}: file {file} {problem}")]
    File {
        /// The snapshot.
        id: String,
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
}

impl Manifest {
    /// Whether it is a template's, and not a user's machine. One that stands on nothing always is.
    pub fn is_template(&self) -> bool {
        self.template || self.parent.is_none()
    }

    /// Bytes its own files really take.
    pub fn allocated_bytes(&self) -> u64 {
        self.files.values().map(|f| f.allocated_bytes).sum()
    }

    /// Reads a snapshot directory's manifest.
    pub fn read(dir: &Path) -> Result<Self, ManifestError> {
        let path = dir.join(MANIFEST);
        let text = std::fs::read(&path)
            .map_err(|source| ManifestError::Read { path: path.clone(), source })?;
        // The format is looked at first: another format need not parse as this one.
        #[derive(Deserialize)]
        struct Head {
            format: u32,
            id: String,
        }
        let malformed = |source| ManifestError::Malformed { path: path.clone(), source };
        let head: Head = serde_json::from_slice(&text).map_err(malformed)?;
        if head.format != FORMAT {
            return Err(ManifestError::Format { id: head.id, found: head.format });
        }
        serde_json::from_slice(&text).map_err(malformed)
    }

    /// Checks everything that can be checked without reading the files: compatibility with this
    /// host, and that each file is there with its length.
    pub fn check(&self, dir: &Path, here: &Compat) -> Result<(), ManifestError> {
        let differences = self.compat.differences(here);
        if !differences.is_empty() {
            return Err(ManifestError::Incompatible { id: self.id.clone(), differences });
        }
        for (name, entry) in &self.files {
            let problem = match std::fs::metadata(dir.join(name)) {
                Err(e) => format!("cannot be read: {e}"),
                Ok(meta) if meta.len() != entry.bytes => {
                    format!("has {} bytes instead of {}", meta.len(), entry.bytes)
                }
                Ok(_) => continue,
            };
            return Err(ManifestError::File { id: self.id.clone(), file: name.clone(), problem });
        }
        Ok(())
    }
}
