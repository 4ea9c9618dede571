//! The terminal: a WebSocket with a shell behind it, and `rethaw shell` on a terminal of its own.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use hyper::Request;
use nix::pty::{Winsize, openpty};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::client::{DEADLINE, within};
use crate::service::{Service, rethaw};

async fn open(service: &Service, path: &str) -> WebSocketStream<TcpStream> {
    let authority = service.client().url().strip_prefix("http://").unwrap().to_owned();
    let stream = TcpStream::connect(&authority).await.unwrap();
    let request = Request::get(format!("ws://{authority}{path}"))
        .header("host", &authority)
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", generate_key())
        .header("authorization", format!("Bearer {}", service.key()))
        .body(())
        .unwrap();
    within("the terminal", client_async(request, stream)).await.unwrap().0
}

/// Reads until the terminal has shown this.
async fn shown(socket: &mut WebSocketStream<TcpStream>, wanted: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        match within(wanted, socket.next()).await.unwrap().unwrap() {
            Message::Binary(bytes) => seen.push_str(&String::from_utf8_lossy(&bytes)),
            other => panic!("{other:?} instead of {wanted}; seen: {seen}"),
        }
    }
    seen
}

#[tokio::test]
async fn a_terminal_is_a_web_socket() {
    let service = Service::start(1).await;
    let id = service.create().await;
    let path = format!("/v1/sandboxes/{id}/pty?cols=100&rows=30&term=vt100&user=user");
    let mut socket = open(&service, &path).await;
    let type_in = |text: &str| Message::Binary(text.as_bytes().to_vec().into());
    socket.send(type_in("stty size; echo $TERM; whoami\n")).await.unwrap();
    let seen = shown(&mut socket, "user\r\n").await;
    assert!(seen.contains("30 100\r\nvt100\r\n"), "{seen}");
    let resize = json!({ "resize": { "cols": 120, "rows": 40 } }).to_string();
    socket.send(Message::Text(resize.into())).await.unwrap();
    socket.send(Message::Text(r#"{"of a newer client": 1}"#.into())).await.unwrap();
    socket.send(type_in("stty size\n")).await.unwrap();
    shown(&mut socket, "40 120\r\n").await;
    socket.send(type_in("exit 7\n")).await.unwrap();
    let exit = loop {
        match within("the end", socket.next()).await.unwrap().unwrap() {
            Message::Text(text) => break serde_json::from_str::<Value>(&text).unwrap(),
            Message::Binary(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(exit, json!({ "exit": { "code": 7 } }));

    // A shell ends with its connection.
    let mut socket = open(&service, &format!("/v1/sandboxes/{id}/pty")).await;
    socket.send(type_in("echo pid=$$; exec sleep 86398\n")).await.unwrap();
    shown(&mut socket, "pid=").await;
    let there = "pgrep -x sleep >/dev/null && echo there || echo gone";
    service
        .until("the shell runs", async || (service.sh(&id, there).await == "there").then_some(()))
        .await;
    drop(socket);
    service
        .until("the shell is gone", async || (service.sh(&id, there).await == "gone").then_some(()))
        .await;

    let plain = service.client().get(&format!("/v1/sandboxes/{id}/pty")).await;
    plain.refused(426, "websocket_needed");
    let path = format!("/v1/sandboxes/{}/pty", "a".repeat(20));
    service.client().get(&path).await.refused(404, "sandbox_not_found");
    service.stop().await;
}

/// Reads a terminal until it has shown this.
fn read_until(terminal: &OwnedFd, wanted: &str) -> String {
    let mut file = std::fs::File::from(terminal.try_clone().unwrap());
    let (mut seen, started) = (String::new(), Instant::now());
    let mut buffer = [0; 4096];
    while !seen.contains(wanted) {
        assert!(started.elapsed() < DEADLINE, "never shown: {wanted}; seen: {seen}");
        match file.read(&mut buffer) {
            Ok(n) if n > 0 => seen.push_str(&String::from_utf8_lossy(&buffer[..n])),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => panic!("{other:?} instead of {wanted}; seen: {seen}"),
        }
    }
    seen
}

#[tokio::test]
async fn the_shell_command_is_a_terminal() {
    let service = Service::start(1).await;
    let id = service.create().await;
    let size = Winsize { ws_row: 33, ws_col: 99, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).unwrap();
    nix::fcntl::fcntl(
        pty.master.as_fd(),
        nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
    )
    .unwrap();
    let end = || std::process::Stdio::from(pty.slave.try_clone().unwrap());
    let mut command = rethaw();
    command.env("RETHAW_URL", service.client().url()).env("RETHAW_API_KEY", service.key());
    command.args(["shell", &id[..8], "--user", "user"]).stdin(end()).stdout(end()).stderr(end());
    let mut shell = command.spawn().unwrap();
    let master = pty.master.try_clone().unwrap();
    let talk = tokio::task::spawn_blocking(move || {
        let mut keys = std::fs::File::from(master.try_clone().unwrap());
        read_until(&master, "$ ");
        keys.write_all(b"stty size; whoami; exit 5\n").unwrap();
        read_until(&master, "user\r\n")
    });
    let seen = within("the shell", talk).await.unwrap();
    assert!(seen.contains("33 99"), "{seen}");
    let ended = service.until("the shell ends", async || shell.try_wait().unwrap()).await;
    assert_eq!(ended.code(), Some(5));
    service.stop().await;
}
