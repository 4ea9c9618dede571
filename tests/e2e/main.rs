//! End to end: the real service with real VMs, asked over HTTP and through the command line.
//!
//! Each test starts a service of its own in a home of its own. Guest image and golden snapshot are
//! made once and shared; see [`home`]. At most two tests run at a time, because a service with its
//! VMs keeps a small machine busy by itself. No test asserts on how long something took: waits have
//! generous deadlines and end at the event.

#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod browser;
mod client;
mod home;
mod process;
mod service;
mod world;

mod commands;
mod crash;
mod dashboard;
mod death;
mod e2b;
mod encryption;
mod exec;
mod feed;
mod files;
mod fork;
mod idempotency;
mod identity;
mod identity_faults;
mod identity_first;
mod identity_hooks;
mod identity_journal;
mod identity_verify;
mod keys;
mod listen;
mod memory;
mod metrics;
mod network;
mod network_leftover;
mod network_traffic;
mod openapi;
mod package;
mod pause;
mod ports;
mod refusals;
mod request_ids;
mod restart;
mod sandboxes;
mod soak;
mod templates;
mod terminal;
mod with_firecracker;
