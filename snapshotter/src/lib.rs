#![deny(unsafe_code)]
//! Guest images, cold boot, the VMM drivers, and the snapshot format and store.

pub mod delta;
pub mod disk;
pub mod firecracker;
pub mod golden;
pub mod host;
pub mod image;
pub mod manifest;
pub mod priority;
pub mod process;
pub mod qemu;
pub mod store;
pub mod tap;
pub mod vmm;
