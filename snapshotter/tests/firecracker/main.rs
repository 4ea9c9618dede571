//! The Firecracker driver against the real Firecracker, on whatever KVM this host has.
//!
//! The guest is a few dozen instructions of our own ([`guest`]), which even an interpreting KVM runs.

mod guest;
mod lifecycle;
mod rig;
