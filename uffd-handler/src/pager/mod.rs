//! The inside of `rethaw-pager`.
//!
//! The main thread talks to the service and keeps the table of VMs; each VM has a thread of its
//! own that answers its faults, so that a slow disk or a memory limit of one VM is nobody else's
//! delay, and one more thread while pages are put in place ahead of demand.

mod answer;
mod fill;
mod layer_cache;
mod modest;
mod serve;
mod server;
mod session;
mod spin;
mod vm;

pub use server::{PagerConfig, PagerError, run};
pub use spin::SpinPolicy;
