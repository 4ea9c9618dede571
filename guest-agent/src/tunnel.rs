//! A TCP connection to a port inside the guest, carried by one request: the request's body goes to
//! the port, what the port sends is the answer's body.

use crate::query;
use crate::server::{Answer, ApiError, Body};
use crate::wire::codes;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::http::Response;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

/// A port of the guest itself answers at once or not at all.
const CONNECT: Duration = Duration::from_secs(5);
const CHUNK: usize = 16 * 1024;
/// Pieces read ahead of the other side.
const QUEUE: usize = 4;

/// `POST /tunnel?port=`.
///
/// # Errors
/// 502 `port_not_open`.
pub async fn open(query: &str, body: Incoming) -> Answer {
    let port = query::get(query, "port")?.unwrap_or_default();
    let port: u16 = port.parse().ok().filter(|p| *p != 0).ok_or_else(|| {
        ApiError::new(400, codes::INVALID_REQUEST, format!("port={port} is no port"))
    })?;
    let (read, write) = connect(port).await?.into_split();
    tokio::task::spawn_local(upload(body, write));
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::task::spawn_local(download(read, sender));
    Ok(Response::new(Body::Stream(receiver)))
}

async fn connect(port: u16) -> Result<TcpStream, ApiError> {
    let mut last = None;
    // Servers that listen on one family of addresses only are common.
    for host in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
        match tokio::time::timeout(CONNECT, TcpStream::connect(SocketAddr::new(host, port))).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => last = Some(last.unwrap_or(error)),
            Err(_) => last = Some(io::ErrorKind::TimedOut.into()),
        }
    }
    let reason = last.map_or_else(String::new, |e| format!(": {e}"));
    Err(ApiError::new(502, codes::PORT_NOT_OPEN, format!("port {port} is not open{reason}")))
}

async fn upload(mut body: Incoming, mut write: OwnedWriteHalf) {
    while let Some(Ok(frame)) = body.frame().await {
        let Ok(data) = frame.into_data() else { continue };
        if write.write_all(&data).await.is_err() {
            return;
        }
    }
    // Dropping the half would do the same; an error means the port has closed already.
    let _ = write.shutdown().await;
}

async fn download(mut read: OwnedReadHalf, sender: mpsc::Sender<io::Result<Bytes>>) {
    loop {
        let mut chunk = BytesMut::with_capacity(CHUNK);
        let piece = tokio::select! {
            piece = read.read_buf(&mut chunk) => piece,
            () = sender.closed() => return,
        };
        let piece = match piece {
            Ok(0) => return,
            Ok(_) => Ok(chunk.freeze()),
            Err(error) => Err(error),
        };
        let failed = piece.is_err();
        if sender.send(piece).await.is_err() || failed {
            return;
        }
    }
}
