//! The HTTP/2 server that runs in the guest: one connection at a time is given to
//! [`serve_connection`], which routes each request to the module that owns its resource.

mod body;
mod first;
mod reply;
mod rewound;
mod router;

pub use body::{Body, read_json, read_limited};
pub use reply::{Answer, ApiError, json, no_content};

use crate::agent::Agent;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::rc::Rc;
use tokio::io::{AsyncRead, AsyncWrite};

/// Receive windows in the guest: what one upload may have in flight, and all of them together.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Requests at once on one connection.
const MAX_STREAMS: u32 = 256;

/// Puts the futures of one connection on the agent's only thread.
#[derive(Debug, Clone, Copy)]
struct LocalExecutor;

impl<F> hyper::rt::Executor<F> for LocalExecutor
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

/// Serves HTTP/2, and what may come before it, on `io` until the other side is gone. Must run inside a `LocalSet`.
pub async fn serve_connection<S>(io: S, agent: Rc<Agent>)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    // A connection ends when its host does; there is nobody left to tell about it.
    let Ok(io) = first::answer(io, &agent).await else { return };
    let service = service_fn(move |request| {
        let agent = Rc::clone(&agent);
        async move { Ok::<_, Infallible>(router::handle(agent, request).await) }
    });
    let _ = hyper::server::conn::http2::Builder::new(LocalExecutor)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .serve_connection(TokioIo::new(io), service)
        .await;
}
