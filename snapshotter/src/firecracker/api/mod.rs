//! Firecracker's API: a client over its unix socket, and one file of types per resource.
//!
//! Every call has a deadline that covers connecting, sending and the whole answer, and a refusal
//! carries Firecracker's own `fault_message`.

mod client;
mod machine;
mod snapshot;
mod storage;

pub use client::{ApiClient, ApiError};
pub(crate) use client::{connect, short_path};
pub use machine::{
    BootSource, CpuTemplate, EntropyDevice, InstanceInfo, InstanceState, MachineConfig, VmState,
};
pub use snapshot::{
    LoadHugePages, MemoryBackendType, NetworkOverride, SnapshotCreate, SnapshotLoad, SnapshotType,
};
pub use storage::{
    CacheType, Drive, IoEngine, NetworkInterface, RateLimiter, TokenBucket, VsockDevice,
};
