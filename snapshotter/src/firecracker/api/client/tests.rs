use super::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

const V: Version = Version::new(1, 12, 1);
const LONG: Duration = Duration::from_secs(10);

/// Answers one request with `answer`; resolves to what was sent.
fn serve_once(listener: UnixListener, answer: &'static str) -> tokio::task::JoinHandle<String> {
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut got = Vec::new();
        let mut buf = [0; 4096];
        while !got.ends_with(b"}") && !got.ends_with(b"\r\n\r\n") {
            let n = stream.read(&mut buf).await.unwrap();
            assert_ne!(n, 0);
            got.extend_from_slice(&buf[..n]);
        }
        stream.write_all(answer.as_bytes()).await.unwrap();
        String::from_utf8(got).unwrap()
    })
}

#[tokio::test]
async fn says_what_firecracker_says() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a.sock");
    let server = serve_once(
        UnixListener::bind(&socket).unwrap(),
        "HTTP/1.1 400 \r\nContent-Length: 38\r\n\r\n{\"fault_message\":\"Invalid vcpu count\"}",
    );
    let e = ApiClient::new(&socket, V).start(LONG).await.unwrap_err();
    assert!(e.to_string().contains("Invalid vcpu count"), "{e}");
    assert!(matches!(e, ApiError::Refused { status: 400, .. }), "{e:?}");
    let sent = server.await.unwrap();
    assert!(sent.starts_with("PUT /actions HTTP/1.1\r\n"), "{sent}");
    assert!(sent.ends_with(r#"{"action_type":"InstanceStart"}"#), "{sent}");
}

#[tokio::test]
async fn a_silent_server_meets_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let deadline = Duration::from_millis(50);
    let e = ApiClient::new(&socket, V).patch_vm(VmState::Paused, deadline).await.unwrap_err();
    assert!(matches!(e, ApiError::Timeout { .. }), "{e:?}");
    assert_eq!(e.to_string(), "PATCH /vm: no answer within 50ms");
}

#[tokio::test]
async fn a_server_that_dies_is_an_error_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = serve_once(listener, "");
    let e = ApiClient::new(&socket, V).start(LONG).await.unwrap_err();
    assert!(matches!(e, ApiError::Io { .. }), "{e:?}");
    server.await.unwrap();
    let e = ApiClient::new(dir.path().join("none"), V).start(LONG).await.unwrap_err();
    assert!(matches!(&e, ApiError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound));
}

#[tokio::test]
async fn reaches_sockets_deeper_than_an_address_is_long() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
    std::fs::create_dir_all(&deep).unwrap();
    let socket = deep.join("a.sock");
    let (_dir, short) = short_path(&socket).unwrap();
    let body =
        r#"{"id":"x","state":"Not started","vmm_version":"1.12.1","app_name":"Firecracker"}"#;
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let server = serve_once(UnixListener::bind(short).unwrap(), answer.leak());
    let info = ApiClient::new(&socket, V).instance(LONG).await.unwrap();
    assert_eq!(info.state, InstanceState::NotStarted);
    server.await.unwrap();
}
