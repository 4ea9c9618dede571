//! What is going on right now, for whoever watches: the dashboard and `rethaw top`.
//!
//! ```text
//! whoever changes something --changed()--> bell --------------+
//! whoever times something ---took()-----> samples --tick--+   +--> viewers (http/events.rs)
//!                                                         v   |
//!                                              history: a ring of points
//! ```
//!
//! Bell and samples are one per process, like the metrics recorder: a pool need not know who is
//! watching. Nothing is rendered while nobody does.

mod bell;
mod faults;
pub mod history;
pub mod host;
pub mod latency;

pub use bell::{changed, listen};
pub use history::History;
pub use latency::{Series, took};
