use super::*;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixListener;

const LONG: Duration = Duration::from_secs(20);

async fn accept(listener: &UnixListener) -> (BufReader<UnixStream>, String) {
    let (stream, _) = listener.accept().await.unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).await.unwrap();
    (reader, line)
}

#[tokio::test]
async fn retries_through_hang_ups_and_silence_until_the_guest_listens() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("v.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = tokio::spawn(async move {
        drop(accept(&listener).await); // nobody listens in the guest
        let silent = accept(&listener).await; // swallowed by the transport reset
        let (mut third, line) = accept(&listener).await;
        assert_eq!(line, "CONNECT 7000\n");
        third.get_mut().write_all(b"OK 1073741824\nfirst bytes").await.unwrap();
        drop(silent);
    });
    let mut stream = dial(&socket, 7000, LONG).await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "first bytes", "nothing of the guest's may be taken");
    server.await.unwrap();
}

#[tokio::test]
async fn ends_at_its_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("v.sock");
    let deadline = Duration::from_millis(120);
    let started = Instant::now();
    let e = dial(&socket, 7000, deadline).await.unwrap_err();
    assert!(started.elapsed() >= deadline && started.elapsed() < LONG);
    assert!(matches!(&e, DialError::Timeout { attempts, .. } if *attempts > 3), "{e}");
    let _silent = UnixListener::bind(&socket).unwrap();
    let e = dial(&socket, 7000, deadline).await.unwrap_err();
    assert!(matches!(&e, DialError::Timeout { last, .. } if last == "no answer"), "{e}");
}

#[tokio::test]
async fn something_else_behind_the_socket_is_not_retried() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("v.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, _) = accept(&listener).await;
        stream.get_mut().write_all(b"HTTP/1.1 400 Bad Request\n").await.unwrap();
    });
    let e = dial(&socket, 7000, LONG).await.unwrap_err();
    assert!(matches!(e, DialError::NotFirecracker { .. }), "{e}");
    server.await.unwrap();
}
