//! Devices with a host side: drives, the NIC, vsock; and rate limits.

use serde::{Deserialize, Serialize};

/// A token bucket: `size` tokens, refilled every `refill_time` milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucket {
    /// Bytes or operations.
    pub size: u64,
    /// Spent once, before the bucket proper.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds until the bucket is full again.
    pub refill_time: u64,
}

/// How much a device may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// What a guest's flush means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum CacheType {
    /// Nothing: the host writes back when it likes.
    Unsafe,
    /// fsync on the host.
    Writeback,
}

/// How Firecracker reads and writes the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum IoEngine {
    /// In its own thread.
    Sync,
    /// With `io_uring`.
    Async,
}

/// `PUT /drives/{drive_id}`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Drive {
    /// Names it in the API.
    pub drive_id: String,
    /// File, as Firecracker sees it. It cannot be changed at restore.
    pub path_on_host: String,
    /// Makes Firecracker add `root=` to the kernel command line.
    pub is_root_device: bool,
    /// The guest cannot write.
    pub is_read_only: bool,
    /// What a flush means.
    pub cache_type: CacheType,
    /// How it is read and written.
    pub io_engine: IoEngine,
    /// Limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// `PUT /network-interfaces/{iface_id}`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkInterface {
    /// Names it in the API.
    pub iface_id: String,
    /// The tap.
    pub host_dev_name: String,
    /// MAC address the guest sees; cannot be changed at restore.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// Limit on what the guest receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limit on what the guest sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// `PUT /vsock`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VsockDevice {
    /// The guest's context id. May be the same in all VMs: the socket tells them apart.
    pub guest_cid: u32,
    /// Unix socket that Firecracker makes; it must not exist yet.
    pub uds_path: String,
}
