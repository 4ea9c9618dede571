//! The guest agent as a library: the wire types both sides use, the session that carries HTTP/2
//! over a byte stream without connections, the server that runs in the guest, and (feature
//! `client`) the client the host uses.

pub mod session;
pub mod wire;

mod random;

#[cfg(feature = "client")]
pub mod client;
