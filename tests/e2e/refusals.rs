//! Requests that cannot be granted: each gets its status, its code, and a text that names the
//! place.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::within;
use crate::service::Service;

#[tokio::test]
async fn a_key_is_needed_and_must_be_the_right_one() {
    let service = Service::start(0).await;
    let right = service.key();
    let almost = format!("{}x", &right[..right.len() - 1]);
    for wrong in [None, Some(""), Some("wrong"), Some(&*almost)] {
        for path in ["/v1/sandboxes", "/v1/info", "/v1/pools"] {
            let reply = service.client().with_key(wrong).get(path).await;
            reply.refused(401, "unauthorized");
            assert_eq!(reply.headers["www-authenticate"], "Bearer");
        }
    }
    let reply = service.client().with_key(None);
    reply.send("GET", "/v1/sandboxes", &[("x-api-key", &right)], "").await.expect(200);
    let file = std::fs::metadata(service.home().path().join("api-key")).unwrap();
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
    service.stop().await;
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let service = Service::start(0).await;
    let client = service.client();
    let wanted = json!({ "template": "nope" });
    let message = client.post("/v1/sandboxes", &wanted).await.refused(404, "template_not_found");
    assert!(message.contains("nope"), "{message}");
    for id in ["aaaaaaaaaaaaaaaaaaaa", "x", "..", "%00", "a%2fb"] {
        let path = format!("/v1/sandboxes/{id}");
        let reply = client.get(&path).await;
        assert_eq!(reply.status, 404, "{id}: {}", reply.text());
    }
    for action in ["pause", "resume", "fork"] {
        let reply = service.act("aaaaaaaaaaaaaaaaaaaa", action, &json!({})).await;
        reply.refused(404, "sandbox_not_found");
    }
    for path in ["/nothing", "/v2", "/v1", "/v1/nothing", "/v1/sandboxes/x/nothing"] {
        client.get(path).await.refused(404, "route_not_found");
    }
    for (method, path) in [
        ("PATCH", "/v1/sandboxes"),
        ("PUT", "/v1/sandboxes/aaaaaaaaaaaaaaaaaaaa"),
        ("GET", "/v1/sandboxes/aaaaaaaaaaaaaaaaaaaa/exec"),
        ("DELETE", "/v1/pools/base"),
        ("POST", "/healthz"),
    ] {
        let reply = client.send(method, path, &[], "").await;
        reply.refused(405, "method_not_allowed");
        assert!(reply.headers.contains_key("allow"), "{method} {path}: {:?}", reply.headers);
    }
    service.stop().await;
}

#[tokio::test]
async fn bodies_are_checked_field_by_field() {
    let service = Service::start(1).await;
    let client = service.client();
    for text in ["{", "nonsense", "{\"template\": \"base\"", "{\"template\": \"base\",}", "\u{0}"] {
        client.send("POST", "/v1/sandboxes", &[], text).await.refused(400, "malformed_request");
    }
    client
        .send("POST", "/v1/sandboxes", &[], &b"\xff\xfe"[..])
        .await
        .refused(400, "malformed_request");
    let many: Value =
        (0..33).map(|n| (format!("k{n}"), json!("v"))).collect::<serde_json::Map<_, _>>().into();
    for (field, body) in [
        ("template", json!({})),
        ("template", json!({ "template": 7 })),
        ("timeout_seconds", json!({ "template": "base", "timeout_seconds": "long" })),
        ("timeout_seconds", json!({ "template": "base", "timeout_seconds": -1 })),
        ("timeout_seconds", json!({ "template": "base", "timeout_seconds": 1.5 })),
        ("timeout_seconds", json!({ "template": "base", "timeout_seconds": 0 })),
        (
            "timeout_seconds",
            json!({ "template": "base", "timeout_seconds": 1_000_000_000_000_u64 }),
        ),
        ("on_timeout", json!({ "template": "base", "on_timeout": "explode" })),
        ("metadata", json!({ "template": "base", "metadata": ["a"] })),
        ("metadata.a", json!({ "template": "base", "metadata": { "a": 1 } })),
        ("metadata", json!({ "template": "base", "metadata": many })),
        ("metadata.a", json!({ "template": "base", "metadata": { "a": "x".repeat(2000) } })),
        ("env", json!({ "template": "base", "env": { "A=B": "c" } })),
        ("env", json!({ "template": "base", "env": { "": "c" } })),
        ("env.A", json!({ "template": "base", "env": { "A": "nul\u{0}" } })),
        ("memory", json!({ "template": "base", "memory": 5 })),
    ] {
        let message = client.post("/v1/sandboxes", &body).await.refused(422, "invalid_field");
        assert!(message.contains(field), "{field} is not named: {message}");
    }
    for body in [json!([]), json!("base"), json!(7), Value::Null] {
        client.post("/v1/sandboxes", &body).await.refused(422, "invalid_field");
    }
    let long = json!({ "template": "x".repeat(2 << 20) });
    client.post("/v1/sandboxes", &long).await.refused(413, "body_too_long");
    for (field, body) in [
        ("target", json!({})),
        ("target", json!({ "target": -1 })),
        ("target", json!({ "target": 100_000 })),
    ] {
        let reply = client.json("PUT", "/v1/pools/base", &body).await;
        let message = reply.refused(422, "invalid_field");
        assert!(message.contains(field), "{message}");
    }
    // Nothing of all this left a sandbox, or took one from the pool.
    assert_eq!(client.get("/v1/sandboxes").await.expect(200)["items"], json!([]));
    assert_eq!(service.pool_full(1).await["misses_total"], 0);
    service.stop().await;
}

#[tokio::test]
async fn commands_that_cannot_run_say_why() {
    let service = Service::start(1).await;
    let id = service.create().await;
    service.sh(&id, "echo data > /root/data; chmod 644 /root/data").await;
    for (body, code, place) in [
        (json!({ "argv": ["no-such-program"] }), "program_not_found", "no-such-program"),
        (json!({ "argv": ["/nowhere/at/all"] }), "program_not_found", "/nowhere/at/all"),
        (json!({ "argv": ["/root/data"] }), "program_not_executable", "/root/data"),
        (json!({ "argv": ["/etc"] }), "program_not_executable", "/etc"),
        (json!({ "argv": ["true"], "cwd": "/nowhere" }), "cwd_not_found", "/nowhere"),
        (json!({ "argv": ["true"], "user": "nobody-here" }), "user_not_found", "nobody-here"),
        (json!({ "argv": [] }), "invalid_field", "argv"),
        (json!({ "argv": [""] }), "invalid_field", "argv"),
        (json!({}), "invalid_field", "argv"),
        (json!({ "argv": "ls -l" }), "invalid_field", "argv"),
        (json!({ "argv": ["ls", 7] }), "invalid_field", "argv"),
        (json!({ "argv": ["a\u{0}b"] }), "invalid_field", "argv"),
        (json!({ "argv": ["true"], "timeout_seconds": 0 }), "invalid_field", "timeout_seconds"),
        (json!({ "argv": ["true"], "timeout_seconds": -3 }), "invalid_field", "timeout_seconds"),
        (json!({ "argv": ["true"], "timeout_seconds": 1e9 }), "invalid_field", "timeout_seconds"),
        (json!({ "argv": ["true"], "timeout_seconds": "5" }), "invalid_field", "timeout_seconds"),
        (json!({ "argv": ["true"], "env": { "A=": "1" } }), "invalid_field", "env"),
        (json!({ "argv": ["cat"], "stdin_base64": "%%" }), "invalid_field", "stdin_base64"),
        (
            json!({ "argv": ["cat"], "stdin": "a", "stdin_base64": "YQ==" }),
            "invalid_field",
            "stdin",
        ),
        (json!({ "argv": ["true"], "shell": true }), "invalid_field", "shell"),
    ] {
        for query in ["", "?buffered=true"] {
            let path = format!("/v1/sandboxes/{id}/exec{query}");
            let message = service.client().post(&path, &body).await.refused(422, code);
            assert!(message.contains(place), "{body}: {message}");
        }
    }
    let path = format!("/v1/sandboxes/{id}/exec?buffered=perhaps");
    service
        .client()
        .post(&path, &json!({ "argv": ["true"] }))
        .await
        .refused(400, "malformed_request");
    for count in [json!(0), json!(101), json!(-1), json!("two")] {
        let reply = service.act(&id, "fork", &json!({ "count": count })).await;
        assert!(reply.refused(422, "invalid_field").contains("count"));
    }
    service.act(&id, "resume", &json!({})).await.refused(409, "wrong_state");
    assert_eq!(service.sh(&id, "echo fine").await, "fine");
    service.stop().await;
}

#[tokio::test]
async fn what_is_not_http_does_no_harm() {
    let service = Service::start(0).await;
    let address = service.client().url().strip_prefix("http://").unwrap().to_owned();
    let key = service.key();
    for text in [
        "rubbish\r\n\r\n".to_owned(),
        format!("GET /v1/info HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1 << 20)),
        "POST /v1/sandboxes HTTP/1.1\r\ncontent-length: nine\r\n\r\n".to_owned(),
    ] {
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        // It may hang up before it has read everything.
        let _ = stream.write_all(text.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = within("the connection's end", stream.read_to_end(&mut answer)).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    // A body that stops half-way is the end of that connection only.
    let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
    let head = format!(
        "POST /v1/sandboxes HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\
         content-length: 100\r\n\r\n{{\"templ"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    drop(stream);
    assert_eq!(service.client().get("/v1/sandboxes").await.expect(200)["items"], json!([]));
    service.stop().await;
}
