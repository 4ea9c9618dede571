#![forbid(unsafe_code)]
//! rethaw: keeps microVM sandboxes warm.
//!
//! The way in: [`cli`] parses, [`serve`] puts the service together, [`engine`] is what it does,
//! [`http`] is how it is asked, [`e2b`] how E2B's SDKs ask it.

mod audit;
mod choose;
mod cli;
mod dashboard;
mod doctor;
mod e2b;
mod engine;
mod failpoint;
mod http;
mod listen;
mod live;
mod log;
mod metrics;
mod net;
mod paths;
mod serve;

/// A claim's requests for memory come after a pause in which other processes had the caches, and
/// the C library's allocator walks far to serve them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    cli::main()
}
