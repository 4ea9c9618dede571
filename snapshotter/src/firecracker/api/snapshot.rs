//! Making and loading snapshots.

use serde::Serialize;
use serde_json::{Value, json};

use crate::firecracker::version::{Field, UnsupportedField, Version};

/// Full or diff.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum SnapshotType {
    /// All of memory.
    Full,
    /// The pages written since the VM was loaded, or since the last snapshot; merged into the
    /// memory file when that is there already and has the size of the guest's memory.
    Diff,
}

/// `PUT /snapshot/create`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SnapshotCreate {
    /// Full or diff.
    pub snapshot_type: SnapshotType,
    /// Device state file.
    pub snapshot_path: String,
    /// Memory file.
    pub mem_file_path: String,
}

/// Where a restored VM's memory comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryBackendType {
    /// A private mapping of this file.
    File(String),
    /// A page server that listens on this socket.
    Uffd(String),
}

/// Another tap for a NIC of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkOverride {
    /// The NIC.
    pub iface_id: String,
    /// Its tap.
    pub host_dev_name: String,
}

/// Page size of a restored guest, where the snapshot's is not wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum LoadHugePages {
    /// 4 KiB.
    None,
    /// Transparent huge pages.
    Transparent,
    /// 2 MiB from hugetlbfs.
    #[serde(rename = "2M")]
    TwoMebibytes,
}

/// `PUT /snapshot/load`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotLoad {
    /// Device state file.
    pub snapshot_path: String,
    /// Memory.
    pub memory: MemoryBackendType,
    /// Makes diff snapshots of the restored VM possible.
    pub track_dirty_pages: bool,
    /// Runs at once.
    pub resume_vm: bool,
    /// Other taps.
    pub network_overrides: Vec<NetworkOverride>,
    /// Moves kvm-clock to the host's time.
    pub clock_realtime: bool,
    /// Another vsock socket.
    pub vsock_uds_path: Option<String>,
    /// Another page size.
    pub huge_pages: Option<LoadHugePages>,
}

impl SnapshotLoad {
    /// Loads `snapshot_path` with memory from `memory`, and nothing special.
    pub fn new(snapshot_path: impl Into<String>, memory: MemoryBackendType) -> Self {
        Self {
            snapshot_path: snapshot_path.into(),
            memory,
            track_dirty_pages: false,
            resume_vm: false,
            network_overrides: Vec::new(),
            clock_realtime: false,
            vsock_uds_path: None,
            huge_pages: None,
        }
    }

    /// What is sent to `version`.
    pub fn body(&self, version: Version) -> Result<Value, UnsupportedField> {
        let (kind, path) = match &self.memory {
            MemoryBackendType::File(path) => ("File", path),
            MemoryBackendType::Uffd(path) => ("Uffd", path),
        };
        let mut body = json!({
            "snapshot_path": self.snapshot_path,
            "mem_backend": { "backend_type": kind, "backend_path": path },
            "resume_vm": self.resume_vm,
        });
        if self.track_dirty_pages {
            // The same thing under an older name.
            let name = if Field::LoadTrackDirtyPages.known_to(version) {
                Field::LoadTrackDirtyPages.name()
            } else {
                "enable_diff_snapshots"
            };
            body[name] = json!(true);
        }
        if !self.network_overrides.is_empty() {
            Field::NetworkOverrides.require(version)?;
            body["network_overrides"] = json!(self.network_overrides);
        }
        if self.clock_realtime {
            Field::ClockRealtime.require(version)?;
            body["clock_realtime"] = json!(true);
        }
        if let Some(path) = &self.vsock_uds_path {
            Field::VsockOverride.require(version)?;
            body["vsock_override"] = json!({ "uds_path": path });
        }
        if let Some(pages) = self.huge_pages {
            Field::LoadHugePages.require(version)?;
            body["huge_pages"] = json!(pages);
        }
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Version = Version::new(1, 12, 1);
    const NEW: Version = Version::new(1, 16, 1);

    fn load() -> SnapshotLoad {
        SnapshotLoad::new("vmstate", MemoryBackendType::Uffd("uffd.sock".into()))
    }

    #[test]
    fn a_plain_load_has_only_what_every_version_knows() {
        let want = json!({
            "snapshot_path": "vmstate",
            "mem_backend": { "backend_type": "Uffd", "backend_path": "uffd.sock" },
            "resume_vm": false,
        });
        assert_eq!(load().body(OLD).unwrap(), want);
        assert_eq!(load().body(NEW).unwrap(), want);
    }

    #[test]
    fn dirty_tracking_has_the_name_its_version_gives_it() {
        let l = SnapshotLoad { track_dirty_pages: true, ..load() };
        let (old, new) = (l.body(OLD).unwrap(), l.body(NEW).unwrap());
        assert_eq!(old["enable_diff_snapshots"], true);
        assert!(old.get("track_dirty_pages").is_none());
        assert_eq!(new["track_dirty_pages"], true);
        assert!(new.get("enable_diff_snapshots").is_none());
    }

    #[test]
    fn newer_fields_are_refused_for_an_older_version() {
        let clock = SnapshotLoad { clock_realtime: true, ..load() };
        assert!(clock.body(OLD).is_err());
        assert_eq!(clock.body(NEW).unwrap()["clock_realtime"], true);
        let vsock = SnapshotLoad { vsock_uds_path: Some("x".into()), ..load() };
        assert!(vsock.body(OLD).is_err());
        assert_eq!(vsock.body(NEW).unwrap()["vsock_override"]["uds_path"], "x");
        let huge = SnapshotLoad { huge_pages: Some(LoadHugePages::TwoMebibytes), ..load() };
        assert!(huge.body(NEW).is_err());
        assert_eq!(huge.body(Version::new(1, 17, 0)).unwrap()["huge_pages"], "2M");
    }

    #[test]
    fn taps_are_overridden_by_name() {
        let nic = NetworkOverride { iface_id: "eth0".into(), host_dev_name: "tap7".into() };
        let l = SnapshotLoad { network_overrides: vec![nic], ..load() };
        let want = json!([{ "iface_id": "eth0", "host_dev_name": "tap7" }]);
        assert_eq!(l.body(OLD).unwrap()["network_overrides"], want);
    }
}
