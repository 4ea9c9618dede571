//! The OpenAPI document: served as it is checked in, true of the routes there are, and held against
//! the answers of a real service by a tool that thinks up requests of its own.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::{Value, json};

use crate::client::within;
use crate::service::Service;

fn root() -> &'static std::path::Path {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn checked_in() -> String {
    std::fs::read_to_string(root().join("docs/openapi.json")).unwrap()
}

#[tokio::test]
async fn the_document_is_served_and_knows_every_method() {
    let service = Service::start(0).await;
    let anybody = service.client().with_key(None);
    let served = anybody.get("/v1/openapi.json").await;
    assert_eq!(served.text(), checked_in(), "the service and docs/openapi.json differ");
    let document: Value = served.expect(200);
    assert_eq!(document["openapi"], "3.1.0");
    let upper = |method: &String| method.to_uppercase();
    for (path, operations) in document["paths"].as_object().unwrap() {
        let documented: BTreeSet<String> =
            operations.as_object().unwrap().keys().map(upper).collect();
        // What a route takes is what it answers an unknown method with.
        let concrete = path.replace("{id}", "aaaaaaaaaaaaaaaaaaaa");
        let concrete = concrete.replace(['{', '}'], "");
        let reply = service.client().send("FROB", &concrete, &[], "").await;
        reply.refused(405, "method_not_allowed");
        let allowed = reply.headers["allow"].to_str().unwrap();
        let allowed: BTreeSet<String> =
            allowed.split(',').filter(|m| *m != "HEAD").map(str::to_owned).collect();
        assert_eq!(documented, allowed, "{path}");
    }
    service.stop().await;
}

/// However often it is asked to, the service makes no more than this.
const LIMITS: &str = "[limits]\nsandboxes = 4\nvcpus = 4\npool_target = 2\n";

/// Requests by the hundred, sound and broken ones, one after the other and in sequences that follow
/// what the service gave before. What the service may be brought to do is bounded by its own limits
/// and by those in `schemathesis.toml`.
#[tokio::test]
async fn no_request_gets_an_answer_that_is_not_documented() {
    let service = Service::start_configured(1, LIMITS).await;
    let before = service.create_with(&json!({ "timeout_seconds": 3600 })).await;
    let mut schemathesis = Command::new(root().join("scripts/schemathesis"));
    schemathesis
        .arg("--config-file")
        .arg(root().join("tests/schemathesis/schemathesis.toml"))
        .args(["run", "--url", service.client().url()])
        .args(["--checks", "all", "--output-truncate", "false"])
        .arg(root().join("docs/openapi.json"))
        .env("RETHAW_API_KEY", service.key())
        .current_dir(service.home().path());
    let run = tokio::task::spawn_blocking(move || schemathesis.output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{said}\n{}", String::from_utf8_lossy(&run.stderr));
    println!("{said}");
    // It is still the service it was.
    let ready = within("readiness", service.client().get("/readyz")).await;
    assert_eq!(ready.expect(200)["status"], "ready");
    drop(before);
    service.stop().await;
}
