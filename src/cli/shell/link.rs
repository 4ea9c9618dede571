//! The WebSocket to a remote terminal.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hyper::{Request, StatusCode, header};
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::{self, Message, handshake::client::generate_key};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::super::client::{Client, ClientError, QUICK, Stream, encode};
use super::super::output;
use super::terminal::{self, Size};

/// How often an idle connection is tried.
const PING_EVERY: Duration = Duration::from_secs(15);
/// A connection that is silent for longer than this, pings and all, is lost.
const SILENCE: Duration = Duration::from_secs(60);

/// The conversation ended before the shell did.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The connection broke.
    #[error("the connection to the terminal broke: {0}")]
    Broken(#[from] Box<tungstenite::Error>),
    /// Nothing came for too long.
    #[error("the terminal was silent for {} s; the connection is lost", SILENCE.as_secs())]
    Silent,
    /// Closed without an exit code.
    #[error("the terminal was closed without an exit code; the sandbox may be gone")]
    Closed,
    /// Signals cannot be watched.
    #[error("cannot watch for signals: {0}")]
    Signals(#[from] std::io::Error),
    /// The local terminal cannot be written to.
    #[error("{0:#}")]
    Output(anyhow::Error),
}

/// Opens a terminal of `size` in the sandbox.
pub async fn open(
    client: &Client,
    id: &str,
    size: Size,
    user: Option<&str>,
) -> Result<WebSocketStream<Box<dyn Stream>>, ClientError> {
    let term = std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned());
    let Size { cols, rows } = size;
    let mut path = format!("/v1/sandboxes/{id}/pty?cols={cols}&rows={rows}&term={}", encode(&term));
    if let Some(user) = user {
        path.push_str(&format!("&user={}", encode(user)));
    }
    let request = upgrade_request(client, &path).map_err(|e| client.bad_request(&e))?;
    let stream = client.connect().await?;
    let url = client.url().to_owned();
    match tokio::time::timeout(QUICK, client_async(request, stream)).await {
        Ok(Ok((socket, _))) => Ok(socket),
        Ok(Err(tungstenite::Error::Http(response))) => {
            let status = response.status();
            let body = response.body().as_deref().unwrap_or_default();
            if status == StatusCode::NOT_FOUND && body.is_empty() {
                return Err(client.unexpected("it has no terminals"));
            }
            Err(client.refused(status, body, None))
        }
        Ok(Err(e)) => Err(ClientError::Broken { url, reason: e.to_string() }),
        Err(_) => Err(ClientError::NoAnswer { url, what: "terminal", after: QUICK }),
    }
}

fn upgrade_request(client: &Client, path: &str) -> Result<Request<()>, hyper::http::Error> {
    let mut request = client
        .request(hyper::Method::GET, path)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, generate_key())
        .body(())?;
    // The WebSocket library takes whole URLs only; it sends the path alone.
    let whole = format!("ws://{}{}", client.authority(), request.uri());
    *request.uri_mut() = whole.parse()?;
    Ok(request)
}

/// What the other side says in text.
#[derive(Debug, Deserialize)]
struct Told {
    exit: Option<Exit>,
}

#[derive(Debug, Deserialize)]
struct Exit {
    code: i32,
}

/// Passes keys there and bytes here until the remote shell ends; returns its exit code.
pub async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    mut socket: WebSocketStream<S>,
    mut keys: mpsc::Receiver<Vec<u8>>,
) -> Result<u8, LinkError> {
    let mut resized = signal(SignalKind::window_change())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut pings = tokio::time::interval(PING_EVERY);
    let mut heard = Instant::now();
    let mut typing = true;
    loop {
        let send = tokio::select! {
            message = socket.next() => {
                heard = Instant::now();
                match message.ok_or(LinkError::Closed)?.map_err(Box::new)? {
                    Message::Binary(bytes) => output::write(&bytes).map_err(LinkError::Output)?,
                    Message::Text(text) => {
                        // Words of a newer service are passed over.
                        let told = serde_json::from_str::<Told>(&text).ok();
                        if let Some(exit) = told.and_then(|told| told.exit) {
                            let _ = tokio::time::timeout(QUICK, socket.close(None)).await;
                            return Ok((exit.code & 0xff) as u8);
                        }
                    }
                    Message::Close(_) => return Err(LinkError::Closed),
                    Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
                }
                continue;
            }
            typed = keys.recv(), if typing => match typed {
                Some(bytes) => Message::Binary(bytes.into()),
                None => {
                    typing = false;
                    continue;
                }
            },
            _ = resized.recv() => match terminal::size() {
                Ok(size) => Message::Text(json!({ "resize": size }).to_string().into()),
                Err(_) => continue,
            },
            _ = pings.tick() => {
                if heard.elapsed() > SILENCE {
                    return Err(LinkError::Silent);
                }
                Message::Ping(Default::default())
            }
            _ = terminate.recv() => return Ok(128 + SignalKind::terminate().as_raw_value() as u8),
            _ = hangup.recv() => return Ok(128 + SignalKind::hangup().as_raw_value() as u8),
        };
        // A peer that takes nothing any more must not hold up the end.
        let sent = tokio::time::timeout(SILENCE, socket.send(send)).await;
        sent.map_err(|_| LinkError::Silent)?.map_err(Box::new)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_tungstenite::tungstenite::protocol::Role;

    async fn pair()
    -> (WebSocketStream<tokio::io::DuplexStream>, WebSocketStream<tokio::io::DuplexStream>) {
        let (here, there) = tokio::io::duplex(1 << 16);
        let client = WebSocketStream::from_raw_socket(here, Role::Client, None).await;
        let server = WebSocketStream::from_raw_socket(there, Role::Server, None).await;
        (client, server)
    }

    #[tokio::test]
    async fn keys_go_there_and_the_exit_code_comes_back() {
        let (client, mut server) = pair().await;
        let (typed, keys) = mpsc::channel(1);
        let shell = tokio::spawn(async move {
            loop {
                match server.next().await.unwrap().unwrap() {
                    Message::Binary(bytes) => {
                        assert_eq!(&bytes[..], b"exit 7\r");
                        break;
                    }
                    Message::Ping(_) => {}
                    other => panic!("{other:?}"),
                }
            }
            server.send(Message::Text(r#"{"title":"new"}"#.into())).await.unwrap();
            server.send(Message::Text(r#"{"exit":{"code":7}}"#.into())).await.unwrap();
        });
        typed.send(b"exit 7\r".to_vec()).await.unwrap();
        assert_eq!(converse(client, keys).await.unwrap(), 7);
        shell.await.unwrap();
    }

    #[tokio::test]
    async fn a_terminal_that_goes_away_is_an_error() {
        let (client, server) = pair().await;
        drop(server);
        let (_typed, keys) = mpsc::channel(1);
        assert!(converse(client, keys).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_is_given_up() {
        let (client, server) = pair().await;
        let (_typed, keys) = mpsc::channel(1);
        assert!(matches!(converse(client, keys).await, Err(LinkError::Silent)));
        drop(server);
    }
}
