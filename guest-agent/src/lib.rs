//! The guest agent as a library: the wire types both sides use, the session that carries HTTP/2
//! over a byte stream without connections, the server that runs in the guest, and (feature
//! `client`) the client the host uses.

pub mod agent;
pub mod netlink;
pub mod server;
pub mod session;
pub mod transport;
pub mod wire;

mod boot;
mod cgroup;
mod claim;
mod clock;
mod entropy;
mod exec;
mod files;
mod identity;
mod lint;
mod log;
mod notify;
mod query;
mod question;
mod random;
mod resident;
mod settle;
mod token;
mod tunnel;
mod usage;
mod users;
mod watch;

#[cfg(feature = "client")]
pub mod client;

pub use identity::start_journald;
pub use resident::keep_heap;
