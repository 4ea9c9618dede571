//! Commands: what goes in, what comes out and when, and how they end.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::client::within;
use crate::service::Service;

/// Frames of a streamed command, as they come.
pub struct Frames {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Frames {
    /// Starts a command.
    pub async fn start(service: &Service, id: &str, body: &Value) -> Self {
        let path = format!("/v1/sandboxes/{id}/exec");
        let json = [("content-type", "application/json")];
        let reply = service.client().open("POST", &path, &json, body.to_string()).await;
        assert_eq!(reply.status(), 200);
        assert_eq!(reply.headers()["content-type"], "application/x-ndjson");
        Self { body: reply.into_body(), buffer: Vec::new() }
    }

    /// The next frame that is no keepalive; `None` at the end.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            while let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let frame: Value = serde_json::from_slice(&line).unwrap();
                if frame["type"] != "keepalive" {
                    return Some(frame);
                }
            }
            let part = within("the next frame", self.body.frame()).await?.unwrap();
            self.buffer.extend_from_slice(&part.into_data().unwrap());
        }
    }

    /// All that is left.
    pub async fn rest(mut self) -> Vec<Value> {
        let mut frames = Vec::new();
        while let Some(frame) = self.next().await {
            frames.push(frame);
        }
        frames
    }
}

fn frame(kind: &str, data: &str) -> Value {
    json!({ "type": kind, "data": data, "encoding": "utf8" })
}

#[tokio::test]
async fn output_comes_while_the_command_runs() {
    let service = Service::start(1).await;
    let id = service.create().await;
    // It goes on only when told to: had its output been held back, this would not end.
    let script = "echo one; echo two >&2; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo three";
    let mut frames = Frames::start(&service, &id, &json!({ "argv": ["sh", "-c", script] })).await;
    let started = frames.next().await.unwrap();
    assert_eq!(started["type"], "started");
    assert!(started["pid"].as_u64().unwrap() > 1, "{started}");
    let mut first = [frames.next().await.unwrap(), frames.next().await.unwrap()];
    first.sort_by_key(|f| f["type"] != "stdout");
    assert_eq!(first, [frame("stdout", "one\n"), frame("stderr", "two\n")]);

    service.sh(&id, "touch /tmp/go").await;
    let rest = frames.rest().await;
    assert_eq!(rest[0], frame("stdout", "three\n"));
    assert_eq!(rest.len(), 2, "{rest:?}");
    assert_eq!(rest[1]["type"], "exit");
    assert_eq!(rest[1]["code"], 0);
    assert!(rest[1]["duration_ms"].is_u64(), "{rest:?}");
    service.stop().await;
}

#[tokio::test]
async fn a_command_gets_its_surroundings_and_its_end_is_told() {
    let service = Service::start(1).await;
    let id = service.create().await;
    let sh = |script: &str| json!(["sh", "-c", script]);

    let done = service.exec(&id, &json!({ "argv": sh("echo out; echo err >&2; exit 7") })).await;
    assert_eq!((done.stdout(), done.stderr(), done.code()), ("out\n", "err\n", 7));
    assert_eq!(done.0["timed_out"], false);

    let done = service.exec(&id, &json!({ "argv": sh("kill -KILL $$") })).await;
    assert_eq!((done.code(), &done.0["signal"]), (137, &json!("SIGKILL")));

    let slow = json!({ "argv": sh("sleep 600 & echo begun; wait"), "timeout_seconds": 1.5 });
    let done = service.exec(&id, &slow).await;
    assert_eq!((done.stdout(), &done.0["timed_out"]), ("begun\n", &json!(true)), "{}", done.0);
    assert_eq!(service.sh(&id, "pgrep -x sleep || echo none").await, "none", "children go, too");

    let around = json!({
        "argv": sh("echo \"$A|$B\"; pwd; id -un; echo $HOME"),
        "env": { "A": "x y", "B": "a=b" }, "cwd": "/usr/share", "user": "nobody",
    });
    let done = service.exec(&id, &around).await;
    let lines: Vec<_> = done.stdout().lines().collect();
    assert_eq!(&lines[..3], ["x y|a=b", "/usr/share", "nobody"], "{}", done.0);

    let done = service.exec(&id, &json!({ "argv": ["cat"], "stdin": "grüße\n" })).await;
    assert_eq!((done.stdout(), done.code()), ("grüße\n", 0));
    let done = service.exec(&id, &json!({ "argv": ["cat"] })).await;
    assert_eq!((done.stdout(), done.code()), ("", 0), "without input there is an end of file");
    service.stop().await;
}

#[tokio::test]
async fn bytes_that_are_no_text_pass_both_ways() {
    let service = Service::start(1).await;
    let id = service.create().await;
    let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n * 7 + n / 251) as u8).collect();
    let text = STANDARD.encode(&bytes);
    let done = service.exec(&id, &json!({ "argv": ["cat"], "stdin_base64": text })).await;
    assert_eq!(done.0["stdout_encoding"], "base64");
    assert!(done.stdout() == text, "what came back differs");
    let sum = "sha256sum | cut -c 1-64";
    let done = service.exec(&id, &json!({ "argv": ["sh", "-c", sum], "stdin_base64": text })).await;
    use sha2::Digest;
    assert_eq!(done.stdout().trim(), hex::encode(sha2::Sha256::digest(&bytes)));

    // Streamed, each frame says how it is written.
    let body = json!({ "argv": ["sh", "-c", "printf 'a\\377b'; printf text >&2"] });
    let frames = Frames::start(&service, &id, &body).await.rest().await;
    let of = |kind: &str| frames.iter().filter(|f| f["type"] == kind).collect::<Vec<_>>();
    assert_eq!(of("stdout")[0]["encoding"], "base64");
    assert_eq!(STANDARD.decode(of("stdout")[0]["data"].as_str().unwrap()).unwrap(), b"a\xffb");
    assert_eq!(of("stderr")[0], &frame("stderr", "text"));
    service.stop().await;
}

#[tokio::test]
async fn commands_run_side_by_side_and_end_with_their_client() {
    let service = Service::start(1).await;
    let id = service.create().await;
    let mut frames = Frames::start(&service, &id, &json!({ "argv": ["sleep", "86399"] })).await;
    let pid = frames.next().await.unwrap()["pid"].as_u64().unwrap();
    let body = |n: usize| json!({ "argv": ["sh", "-c", format!("sleep 0.3; echo {n}")] });
    let bodies: Vec<_> = (0..8).map(body).collect();
    let all = futures_util::future::join_all(bodies.iter().map(|b| service.exec(&id, b))).await;
    for (n, done) in all.iter().enumerate() {
        assert_eq!(done.stdout(), format!("{n}\n"));
    }
    assert_eq!(service.sh(&id, &format!("test -e /proc/{pid} && echo there")).await, "there");
    drop(frames);
    service
        .until("the command is gone", async || {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let look = format!("test -e /proc/{pid} && echo there || echo gone");
            (service.sh(&id, &look).await == "gone").then_some(())
        })
        .await;
    service.stop().await;
}

#[tokio::test]
async fn much_output_arrives_whole() {
    let service = Service::start(1).await;
    let id = service.create().await;
    // 6 MiB, more than any buffer on the way holds.
    let body = json!({ "argv": ["sh", "-c", "yes 0123456789abcde | head -c 6291456"] });
    let frames = Frames::start(&service, &id, &body).await.rest().await;
    let text: String = frames.iter().filter_map(|f| f["data"].as_str()).collect();
    assert_eq!(text.len(), 6 << 20);
    assert!(text.split_terminator('\n').all(|line| line == "0123456789abcde"));
    assert_eq!(frames.last().unwrap()["code"], 0);
    service.stop().await;
}
