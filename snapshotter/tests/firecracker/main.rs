//! The Firecracker driver against the real Firecracker, on whatever KVM this host has.
//!
//! The guest is a few dozen instructions of our own ([`guest`]), which even an interpreting KVM runs.
//! Where that KVM also boots Linux the end-to-end tests of the service run with this driver too;
//! [`kvm`] prints whether it does.

// Helpers of tests are not known to clippy as tests.
#![allow(clippy::unwrap_used)]

mod errors;
mod guest;
mod handshake;
#[path = "../../../uffd-handler/tests/rig/huge_pages.rs"]
mod huge_pages;
mod install;
mod jail;
mod kvm;
mod lifecycle;
mod memory;
mod network;
mod rig;
