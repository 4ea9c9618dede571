//! The ways a host reaches the agent: a virtio-serial port under QEMU, vsock where there is one.

mod port;
mod vsock;

pub use port::{Port, find as find_port};
pub use vsock::Listener as VsockListener;

use crate::agent::Agent;
use crate::server::serve_connection;
use crate::session::Session;
use std::io;
use std::rc::Rc;
use tokio::io::{AsyncRead, AsyncWrite};

/// Serves one connection after the other on a stream with sessions, until it fails or (where
/// `S` ends for good) ends. Must run inside a `LocalSet`.
///
/// # Errors
/// The stream fails.
pub async fn serve_session<S>(stream: S, agent: Rc<Agent>, reopens: bool) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let session = Session::new(stream);
    session.announce().await?;
    loop {
        match session.accept().await? {
            Some(connection) => serve_connection(connection, Rc::clone(&agent)).await,
            None if reopens => {}
            None => return Ok(()),
        }
    }
}

/// Serves every connection a vsock listener accepts.
///
/// # Errors
/// The listener fails.
pub async fn serve_vsock(listener: VsockListener, agent: Rc<Agent>) -> io::Result<()> {
    loop {
        let connection = listener.accept().await?;
        tokio::task::spawn_local(serve_connection(connection, Rc::clone(&agent)));
    }
}
