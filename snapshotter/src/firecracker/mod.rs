//! The Firecracker driver.

pub mod api;
pub mod kvm;
pub mod version;
