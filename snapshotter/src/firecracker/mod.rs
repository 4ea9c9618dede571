//! The Firecracker driver.

pub mod api;
pub mod version;
