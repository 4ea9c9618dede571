//! Making the connection: session handshake where the transport needs one, then HTTP/2.

use super::{AgentClient, AgentError};
use crate::session::Session;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::watch;

/// HTTP/2 receive windows of the host: a command's output is not held up by round trips.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

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

    /// Connects over a stream that is a connection by itself (vsock).
    ///
    /// # Errors
    /// `Disconnected` when the stream closes, `Timeout` after the deadline.
    pub async fn connect_stream<S>(stream: S, deadline: Duration) -> Result<Self, AgentError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        tokio::time::timeout(deadline, Self::start_http(stream))
            .await
            .map_err(|_| AgentError::Timeout { call: "HTTP/2 handshake".to_owned(), deadline })?
    }

    async fn start_session<S>(stream: S) -> Result<Self, AgentError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let io = Session::new(stream)
            .connect(random)
            .await
            .map_err(|e| AgentError::Disconnected(format!("session handshake: {e}")))?;
        Self::start_http(io).await
    }

    async fn start_http<S>(stream: S) -> Result<Self, AgentError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|e| AgentError::from_hyper(&e))?;
        let (gone, closed) = watch::channel(false);
        tokio::spawn(async move {
            // How it ended is told to the requests on it.
            let _ = connection.await;
            let _ = gone.send(true);
        });
        Ok(Self { sender, closed })
    }
}

fn random() -> std::io::Result<[u8; 16]> {
    let mut bytes = [0u8; 16];
    crate::random::fill(&mut bytes)?;
    Ok(bytes)
}
