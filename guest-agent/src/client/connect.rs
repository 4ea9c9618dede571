//! Making the connection: a session handshake where the transport needs one.

use super::link::Link;
use super::{AgentClient, AgentError};
use crate::session::Session;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

impl AgentClient {
    /// Connects to the agent behind QEMU's chardev socket of the virtio-serial port.
    ///
    /// The agent need not be up yet: its answer is waited for until the deadline, without polling.
    ///
    /// # Errors
    /// `Disconnected` when the socket is not there or closes, `Timeout` after the deadline.
    pub async fn connect_serial(path: &Path, deadline: Duration) -> Result<Self, AgentError> {
        let call = || format!("connect to {}", path.display());
        let lost = |e: std::io::Error| AgentError::Disconnected(format!("{}: {e}", call()));
        let work = async {
            let stream = UnixStream::connect(path).await.map_err(lost)?;
            Self::start_session(stream).await
        };
        tokio::time::timeout(deadline, work)
            .await
            .map_err(|_| AgentError::Timeout { call: call(), deadline })?
    }

    /// Connects over a stream that needs the session handshake, as the virtio-serial port does.
    ///
    /// # Errors
    /// `Disconnected` when the stream closes, `Timeout` after the deadline.
    pub async fn connect_session<S>(stream: S, deadline: Duration) -> Result<Self, AgentError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        tokio::time::timeout(deadline, Self::start_session(stream))
            .await
            .map_err(|_| AgentError::Timeout { call: "session handshake".to_owned(), deadline })?
    }

    /// A client on a stream that is a connection by itself (vsock).
    pub fn on_stream<S>(stream: S) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        Self { link: Arc::new(Link::new(Box::new(stream), false)) }
    }

    async fn start_session<S>(stream: S) -> Result<Self, AgentError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let io = Session::new(stream)
            .connect(random)
            .await
            .map_err(|e| AgentError::Disconnected(format!("session handshake: {e}")))?;
        let may_ask = io.may_ask();
        Ok(Self { link: Arc::new(Link::new(Box::new(io), may_ask)) })
    }
}

fn random() -> std::io::Result<[u8; 16]> {
    let mut bytes = [0u8; 16];
    crate::random::fill(&mut bytes)?;
    Ok(bytes)
}
