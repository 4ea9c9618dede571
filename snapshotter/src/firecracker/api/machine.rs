//! The machine itself: its size, CPU, kernel, entropy device and state.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::RateLimiter;
use crate::firecracker::version::{Field, UnsupportedField, Version};

/// `PUT /machine-config`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// Virtual CPUs, 1 to 32.
    pub vcpu_count: u32,
    /// Memory in MiB.
    pub mem_size_mib: u64,
    /// Makes diff snapshots of the booted VM possible, at the price of a fault per written page.
    pub track_dirty_pages: bool,
    /// Backs the guest by 2 MiB pages.
    pub huge_pages: bool,
}

impl MachineConfig {
    /// What is sent to `version`.
    pub fn body(&self, version: Version) -> Result<Value, UnsupportedField> {
        let mut body = json!({
            "vcpu_count": self.vcpu_count,
            "mem_size_mib": self.mem_size_mib,
            "smt": false,
            "track_dirty_pages": self.track_dirty_pages,
        });
        if self.huge_pages {
            Field::HugePages.require(version)?;
            body["huge_pages"] = json!("2M");
        }
        Ok(body)
    }
}

/// `PUT /cpu-config`: a custom CPU template, as Firecracker's `cpu-template-helper` writes it. It
/// hides CPU features so that a snapshot fits more than one CPU model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CpuTemplate(pub Value);

/// `PUT /boot-source`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BootSource {
    /// Uncompressed kernel.
    pub kernel_image_path: String,
    /// Initramfs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    /// Kernel command line.
    pub boot_args: String,
}

/// `PUT /entropy`: a virtio-rng device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Default)]
pub struct EntropyDevice {
    /// How fast the guest may draw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Body of `PATCH /vm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum VmState {
    /// vCPUs stop.
    Paused,
    /// vCPUs run.
    Resumed,
}

/// State in `GET /`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum InstanceState {
    /// Nothing booted or loaded yet.
    #[serde(rename = "Not started")]
    NotStarted,
    /// vCPUs run.
    Running,
    /// vCPUs are stopped.
    Paused,
}

/// `GET /`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct InstanceInfo {
    /// The id given on Firecracker's command line.
    pub id: String,
    /// State.
    pub state: InstanceState,
    /// Firecracker's version.
    pub vmm_version: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_are_sent_only_where_they_exist() {
        let m = MachineConfig {
            vcpu_count: 2,
            mem_size_mib: 256,
            track_dirty_pages: false,
            huge_pages: true,
        };
        let body = m.body(Version::new(1, 12, 1)).unwrap();
        assert_eq!(body["huge_pages"], "2M");
        assert!(m.body(Version::new(1, 6, 0)).is_err());
        let plain = MachineConfig { huge_pages: false, ..m };
        assert!(plain.body(Version::new(1, 6, 0)).unwrap().get("huge_pages").is_none());
    }
}
