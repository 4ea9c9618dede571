//! The connection under a client: a bare stream at first, on which questions may be asked, and HTTP/2
//! from the first call on.

use super::{AgentError, RequestBody};
use crate::question::{self, Kind};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::sync::OnceLock;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, OnceCell, watch};
use tokio::task::AbortHandle;

/// HTTP/2 receive windows of the host: a command's output is not held up by round trips.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// A stream to an agent.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// The connection.
pub struct Link {
    /// The stream, until HTTP/2 is spoken on it.
    bare: Mutex<Option<Box<dyn Stream>>>,
    /// Whether the agent takes questions on it.
    may_ask: bool,
    http: OnceCell<SendRequest<RequestBody>>,
    /// The task that speaks HTTP/2 on it.
    driver: OnceLock<AbortHandle>,
    gone: watch::Sender<bool>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("http", &self.http.initialized()).finish_non_exhaustive()
    }
}

/// Says that the connection is gone, unless it was put back meanwhile: an exchange that was given up
/// in the middle leaves it unusable.
struct Taken<'a> {
    stream: Option<Box<dyn Stream>>,
    gone: &'a watch::Sender<bool>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.stream.is_some() {
            self.gone.send_replace(true);
        }
    }
}

fn lost() -> AgentError {
    AgentError::Disconnected("the connection was given up".to_owned())
}

impl Link {
    /// A connection that has just been made.
    pub fn new(stream: Box<dyn Stream>, may_ask: bool) -> Self {
        let gone = watch::Sender::new(false);
        let (http, driver) = (OnceCell::new(), OnceLock::new());
        Self { bare: Mutex::new(Some(stream)), may_ask, http, driver, gone }
    }

    /// Ends the connection; requests on it fail.
    pub async fn hang_up(&self) {
        drop(self.bare.lock().await.take());
        if let Some(driver) = self.driver.get() {
            driver.abort();
        }
        self.gone.send_replace(true);
    }

    /// Tells when the connection is gone.
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.gone.subscribe()
    }

    /// Whether it is known to be gone.
    pub fn is_closed(&self) -> bool {
        *self.gone.borrow() || self.http.get().is_some_and(SendRequest::is_closed)
    }

    /// Whether a new connection could be asked on, and this one cannot any more.
    pub fn could_ask_anew(&self) -> bool {
        self.may_ask && self.http.initialized()
    }

    /// Asks before HTTP/2. `None`: it is too late for it, or the agent does not
    /// know the form; the endpoint of the same name does the same.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn ask(
        &self,
        kind: Kind,
        name: &str,
        body: &[u8],
    ) -> Result<Option<(u16, Vec<u8>)>, AgentError> {
        if !self.may_ask {
            return Ok(None);
        }
        let mut bare = self.bare.lock().await;
        let Some(stream) = bare.take() else { return Ok(None) };
        let mut taken = Taken { stream: Some(stream), gone: &self.gone };
        let Some(stream) = &mut taken.stream else { return Err(lost()) };
        let answer = question::ask(stream, kind, name, body).await;
        let answer =
            answer.map_err(|e| AgentError::Disconnected(format!("{}: {e}", kind.path())))?;
        *bare = taken.stream.take();
        Ok(Some(answer))
    }

    /// HTTP/2 on the connection.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn http(&self) -> Result<SendRequest<RequestBody>, AgentError> {
        let sender = self.http.get_or_try_init(|| async {
            let stream = self.bare.lock().await.take().ok_or_else(lost)?;
            let (sender, driver) = start(stream, self.gone.clone()).await?;
            // Set once, as this runs to here only once.
            let _ = self.driver.set(driver);
            Ok(sender)
        });
        sender.await.cloned()
    }
}

async fn start(
    stream: Box<dyn Stream>,
    gone: watch::Sender<bool>,
) -> Result<(SendRequest<RequestBody>, AbortHandle), AgentError> {
    let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| AgentError::from_hyper(&e))?;
    let driver = tokio::spawn(async move {
        // How it ended is told to the requests on it.
        let _ = connection.await;
        gone.send_replace(true);
    });
    Ok((sender, driver.abort_handle()))
}
