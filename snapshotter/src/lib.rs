#![forbid(unsafe_code)]
//! Guest images, cold boot, the VMM drivers, and the snapshot format and store.

pub mod process;
pub mod vmm;
