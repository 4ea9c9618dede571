//! Requests whose body was not read to its end: a refusal often comes before that.
//!
//! On a connection that goes on, the next request would be searched for in the middle of that body,
//! so the connection has to end; and if it ends with bytes of the body still on their way, the peer's
//! kernel may throw the reply away with them. A short rest is therefore read before the reply is sent,
//! and where the rest is long, or does not come, the reply says that the connection ends.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderValue, Version, header};
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};

/// Longest rest that is read in vain, in bytes.
const MAX_REST: usize = 8 << 20;
/// Longest time it may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// Reads what a handler left of its request, or ends the connection after the reply.
pub async fn settle(request: Request, next: Next) -> Response {
    let one_by_one = request.version() <= Version::HTTP_11;
    if !one_by_one || request.body().is_end_stream() {
        return next.run(request).await;
    }
    // Whoever waits for leave to send its body is told "no" by the reply itself.
    let waits = request.headers().contains_key(header::EXPECT);
    let rest = Rest::default();
    let request = request.map(|body| Body::new(Watched { body, rest: rest.clone() }));
    let mut response = next.run(request).await;
    let refused = response.status().is_client_error() || response.status().is_server_error();
    if refused && !rest.is_read(waits).await {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// What is left of a request's body.
#[derive(Debug, Clone)]
struct Rest(Arc<Mutex<Left>>);

#[derive(Debug)]
enum Left {
    /// Somebody still reads.
    Held,
    /// Nobody reads any more, and the end was not reached.
    Dropped(Body),
    Nothing,
}

impl Default for Rest {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Left::Held)))
    }
}

impl Rest {
    fn set(&self, left: Left) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = left;
    }

    fn take(&self) -> Left {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *left, Left::Held)
    }

    /// Whether the body's end is reached, now or after reading a short rest.
    async fn is_read(&self, waits: bool) -> bool {
        match self.take() {
            Left::Nothing => true,
            Left::Dropped(body) if !waits => {
                matches!(tokio::time::timeout(DEADLINE, drain(body)).await, Ok(true))
            }
            Left::Held | Left::Dropped(_) => false,
        }
    }
}

async fn drain(mut body: Body) -> bool {
    let mut read = 0;
    if body.size_hint().lower() > MAX_REST as u64 {
        return false;
    }
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else { return false };
        read += frame.data_ref().map_or(0, bytes::Bytes::len);
        if read > MAX_REST {
            return false;
        }
    }
    true
}

/// A request's body that leaves what was not read of it behind.
struct Watched {
    body: Body,
    rest: Rest,
}

impl HttpBody for Watched {
    type Data = axum::body::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let body = std::mem::take(&mut self.body);
        self.rest.set(if body.is_end_stream() { Left::Nothing } else { Left::Dropped(body) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::post;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    async fn server() -> std::net::SocketAddr {
        let router = Router::new()
            .route("/refuses", post(|| async { StatusCode::FORBIDDEN }))
            .route("/reads", post(|_: String| async { StatusCode::BAD_REQUEST }))
            .layer(axum::middleware::from_fn(settle));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }

    /// Sends one request and gives the reply's head.
    async fn ask(stream: &mut TcpStream, head: &str, body: &[u8]) -> String {
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        let mut reply = Vec::new();
        while !reply.ends_with(b"\r\n\r\n") {
            let byte = tokio::time::timeout(Duration::from_secs(10), stream.read_u8()).await;
            reply.push(byte.unwrap().unwrap());
        }
        String::from_utf8(reply).unwrap()
    }

    #[tokio::test]
    async fn a_connection_goes_on_after_a_refusal() {
        let mut stream = TcpStream::connect(server().await).await.unwrap();
        let body = vec![b'x'; 3 << 20];
        for path in ["refuses", "reads", "refuses"] {
            let length = body.len();
            let head =
                format!("POST /{path} HTTP/1.1\r\nhost: h\r\ncontent-length: {length}\r\n\r\n");
            let reply = ask(&mut stream, &head, &body).await;
            let expected = if path == "reads" { " 413 " } else { " 403 " };
            assert!(reply.contains(expected), "{reply}");
            assert!(!reply.contains("connection: close"), "{reply}");
        }
    }

    #[tokio::test]
    async fn a_long_rest_ends_the_connection() {
        let mut stream = TcpStream::connect(server().await).await.unwrap();
        let head = "POST /refuses HTTP/1.1\r\nhost: h\r\ncontent-length: 100000000\r\n\r\n";
        let reply = ask(&mut stream, head, b"x").await;
        assert!(reply.contains(" 403 ") && reply.contains("connection: close"), "{reply}");
    }

    #[tokio::test]
    async fn who_waits_for_leave_is_not_waited_for() {
        let mut stream = TcpStream::connect(server().await).await.unwrap();
        let head = "POST /refuses HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\n\
            content-length: 10\r\n\r\n";
        let reply = ask(&mut stream, head, b"").await;
        assert!(reply.contains(" 403 ") && reply.contains("connection: close"), "{reply}");
    }
}
