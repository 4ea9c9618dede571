//! Sessions on a byte stream that has no connections of its own.
//!
//! Under QEMU, host and guest share one virtio-serial stream. The host side may be replaced at any
//! byte (a restore, a restarted service), and the guest cannot see where one host ends and the
//! next begins. So both directions are run-length stuffed (see [`codec`]), which leaves room for a
//! reset marker that no data can imitate:
//!
//! ```text
//! host                                   guest
//!   | -- marker(nonce) ------------------> |  drops the connection it had, whatever its state
//!   |    ... stale bytes ignored ...       |
//!   | <------------------ marker(nonce) -- |
//!   | <========== HTTP/2 both ways ======> |
//! ```
//!
//! An agent's marker also says whether it takes a question before HTTP/2 (see [`crate::question`]):
//! one that was frozen into an old template does not.
//!
//! An agent that starts anew says so with a marker of the all-zero nonce: a host in the middle of a
//! connection sees it as gone, a host in the middle of its handshake sends a new marker.

pub mod codec;
mod io;

pub use codec::Nonce;
pub use io::{Session, SessionIo};
