//! The live feed: `/v1/stats`, `/v1/events`, and `rethaw top` over both.

use std::process::{Command, Stdio};

use futures_util::StreamExt;
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::client::within;
use crate::service::{Service, id, rethaw};

/// An open event stream.
struct Events {
    body: http_body_util::BodyStream<Incoming>,
    buffer: String,
}

impl Events {
    async fn open(service: &Service) -> Self {
        let reply = service.client().open("GET", "/v1/events", &[], "").await;
        assert_eq!(reply.status(), 200);
        assert_eq!(reply.headers()["content-type"], "text/event-stream");
        Self { body: http_body_util::BodyStream::new(reply.into_body()), buffer: String::new() }
    }

    /// The next event; none at the end of the stream.
    async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                let part = |name: &str| {
                    event.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim()
                };
                let parsed =
                    (part("event:").to_owned(), serde_json::from_str(part("data:")).unwrap());
                self.buffer = rest.to_owned();
                return Some(parsed);
            }
            let frame = within("an event", self.body.next()).await?.ok()?;
            self.buffer.push_str(std::str::from_utf8(&frame.into_data().unwrap()).unwrap());
        }
    }

    /// Waits for an event of this name of which something is true.
    async fn until(&mut self, name: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let wait = async {
            loop {
                let (event, value) = self.next().await.expect("the stream goes on");
                if event == name && fits(&value) {
                    return value;
                }
            }
        };
        within(name, wait).await
    }
}

fn lists(sandboxes: &Value, id: &str) -> bool {
    sandboxes["items"].as_array().unwrap().iter().any(|one| one["id"] == id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_feed_tells_what_changes() {
    let service = Service::start(1).await;
    let mut events = Events::open(&service).await;
    let (name, snapshot) = events.next().await.unwrap();
    assert_eq!(name, "snapshot");
    assert_eq!(snapshot["pools"][0]["ready"], 1);
    assert_eq!(snapshot["templates"][0]["state"], "ready");
    assert_eq!(snapshot["sandboxes"]["total"], 0);
    assert!(snapshot["history"]["capacity"].as_u64().unwrap() >= 100);

    let sandbox = service.create().await;
    events.until("sandboxes", |sandboxes| lists(sandboxes, &sandbox)).await;
    // Its number comes with the end of the interval, which may be before the pool is full again.
    let point = events.until("point", |point| point["claims_warm"]["count"] == 1).await;
    let p50 = point["claims_warm"]["p50_ms"].as_f64().unwrap();
    assert!(p50 > 0.0 && point["claims_warm"]["p99_ms"].as_f64() == Some(p50), "{point}");
    assert_eq!(point["pools"]["base"]["low"], 0, "the pool was empty for a while: {point}");
    assert!(point["host"]["memory_used_bytes"].as_u64().unwrap() > 0, "{point}");
    service.pool_full(1).await;
    // A guest that touches memory it never had faults.
    service.sh(&sandbox, "python3 -c 'bytearray(16 << 20)'").await;
    events.until("point", |point| point["faults"]["per_second"].as_f64().unwrap() > 0.0).await;

    service.set_pool(0).await;
    events.until("pools", |pools| pools[0]["target"] == 0 && pools[0]["ready"] == 0).await;
    let cold = id(&service.create_with(&json!({})).await);
    let point = events.until("point", |point| point["claims_cold"]["count"] == 1).await;
    assert!(point["claims_cold"]["p50_ms"].as_f64().unwrap() > 0.0, "{point}");
    for gone in [&sandbox, &cold] {
        assert_eq!(service.client().delete(&format!("/v1/sandboxes/{gone}")).await.status, 204);
    }
    events.until("sandboxes", |sandboxes| sandboxes["total"] == 0).await;

    // What it told is what can be asked for, and a stop does not wait for viewers.
    let stats = service.client().get("/v1/stats").await.expect(200);
    let counted = |name: &str| -> u64 {
        let points = stats["history"]["points"].as_array().unwrap();
        points.iter().map(|point| point[name]["count"].as_u64().unwrap()).sum()
    };
    assert_eq!((counted("claims_warm"), counted("claims_cold")), (1, 1));
    service.stop().await;
    within("the end of the stream", async { while events.next().await.is_some() {} }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn viewers_are_counted_and_limited() {
    let service = Service::start_with(0, &[]).await;
    let mut open = Vec::new();
    for _ in 0..64 {
        open.push(Events::open(&service).await);
    }
    let metrics = service.client().get("/metrics").await.text();
    assert!(metrics.contains("\nrethaw_viewers 64\n"), "{metrics}");
    let refused = service.client().get("/v1/events").await;
    refused.refused(429, "too_many_viewers");
    assert!(refused.headers.contains_key("retry-after"));
    // A place is free again when a viewer has gone.
    drop(open.pop());
    service
        .until("a free place", async || {
            let reply = service.client().open("GET", "/v1/events", &[], "").await;
            (reply.status() == 200).then_some(())
        })
        .await;
    drop(open);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn top_works_on_and_off_a_terminal() {
    let service = Service::start(1).await;
    let sandbox = id(&service.create_with(&json!({ "metadata": { "name": "web" } })).await);

    let once = service.cli(&["top", "--once"]).await;
    let text = String::from_utf8(once.stdout).unwrap();
    assert!(once.status.success(), "{text}");
    for part in ["rethaw ", "POOL", "base", "LATENCY", "claim, warm", &sandbox, "web"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains('\x1b'), "{text}");
    let json = service.cli(&["top", "--once", "--json"]).await;
    let stats: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(stats["sandboxes"]["items"][0]["id"], sandbox.as_str());

    // Into a pipe that is closed after two lines: no noise, and it ends.
    let script = format!("{} top --json | head -n 2", rethaw().get_program().display());
    let lines = shell(&service, &script).await;
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    let seq = |line: &Value| line["point"]["seq"].as_u64().unwrap();
    assert_eq!(seq(&lines[1]), seq(&lines[0]) + 1);

    // On a terminal it draws on the other screen and leaves it on `q`.
    let typescript = service.home().path().join("typescript");
    let script = format!(
        "(until grep -q {sandbox} {file}; do sleep 0.1; done; printf q) | \
         script -qefc 'stty rows 30 cols 100; {rethaw} top' {file}",
        file = typescript.display(),
        rethaw = rethaw().get_program().display(),
    );
    std::fs::write(&typescript, "").unwrap();
    let drawn = shell(&service, &script).await;
    for part in ["\x1b[?1049h", &sandbox, "\x1b[?1049l"] {
        assert!(drawn.contains(part), "{part:?}: {drawn:?}");
    }
    service.stop().await;
}

/// Standard output of a shell script that may use the service.
async fn shell(service: &Service, script: &str) -> String {
    let mut command = Command::new("bash");
    command
        .args(["-ec", script])
        .env("RETHAW_URL", service.client().url())
        .env("RETHAW_HOME", service.home().path())
        .stdin(Stdio::null());
    let run = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = within(script, run).await.unwrap();
    assert!(output.stderr.is_empty(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
