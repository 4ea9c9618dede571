//! Builds that fail say where and why, and leave nothing.

use serde_json::{Value, json};

use super::{ask, build, built, delete, log, snapshots};
use crate::service::Service;

async fn failing(service: &Service, steps: &Value) -> Value {
    ask(service, "bad", "base", steps).await.expect(202);
    let template = built(service, "bad").await;
    assert_eq!(template["state"], "failed", "{template}");
    let said = log(service, "bad").await;
    let last = said.last().unwrap();
    assert_eq!(last["kind"], "end");
    assert!(last["text"].as_str().unwrap().starts_with("failed: "), "{last}");
    template
}

#[tokio::test]
async fn a_failing_step_is_named_with_its_end() {
    let service = Service::start(0).await;
    let golden = snapshots(&service);
    let failed = failing(
        &service,
        &json!([{ "run": "true" }, { "run": "seq 100; echo no such thing >&2; exit 3" }]),
    )
    .await;
    let failure = &failed["failure"];
    assert_eq!((&failure["step"], &failure["exit_code"]), (&json!(2), &json!(3)), "{failed}");
    let output = failure["output"].as_array().unwrap();
    assert!(output.contains(&json!("100")) && output.contains(&json!("no such thing")));
    assert!(!output.contains(&json!("50")), "only the last lines: {output:?}");
    let error = failed["error"].as_str().unwrap();
    assert!(error.contains("step 2") && error.contains("exit code 3"), "{error}");
    assert!(error.contains("no such thing"), "{error}");

    // One that was started to stay and does not; one that never opens its port; one that hangs.
    let start = json!([{ "start": "echo dying; sleep 1; exit 7" }, { "wait": { "port": 9 } }]);
    let failed = failing(&service, &start).await;
    assert_eq!(failed["failure"]["exit_code"], 7, "{failed}");
    assert_eq!(failed["failure"]["output"], json!(["dying"]), "{failed}");
    let wait = json!([{ "wait": { "port": 9, "timeout_seconds": 1 } }]);
    let failed = failing(&service, &wait).await;
    assert!(failed["error"].as_str().unwrap().contains("port 9 was not open"), "{failed}");
    let hang = json!([{ "run": { "command": "sleep 1000", "timeout_seconds": 1 } }]);
    let failed = failing(&service, &hang).await;
    assert!(failed["error"].as_str().unwrap().contains("no end within 1s"), "{failed}");
    // What clones must not share, and a check that does not work in one.
    let key = json!([{ "run": "mkdir -p /root/.ssh; echo '-----BEGIN PRIVATE KEY-----' > /root/.ssh/id" }]);
    let failed = failing(&service, &key).await;
    assert!(failed["error"].as_str().unwrap().contains("/root/.ssh/id"), "{failed}");
    let check = json!([{ "run": "true" }, { "check": "echo broken; exit 4" }]);
    let failed = failing(&service, &check).await;
    assert_eq!(
        (&failed["failure"]["step"], &failed["failure"]["exit_code"]),
        (&json!(2), &json!(4))
    );

    service
        .client()
        .post("/v1/sandboxes", &json!({ "template": "bad" }))
        .await
        .refused(503, "template_not_ready");
    assert_eq!(snapshots(&service), golden);
    assert_eq!(service.home().vm_ids(), Vec::<String>::new());
    // The command line says the same, and the name can be built anew.
    let done =
        service.cli(&["template", "build", "bad", "--run", "echo from the step; exit 5"]).await;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("from the step") && said.contains("exit code 5"), "{said}");
    build(&service, "bad", "base", &json!([{ "run": "true" }])).await;
    delete(&service, "bad").await.expect(204);
    assert_eq!(snapshots(&service), golden);
    service.stop().await;
}

#[tokio::test]
async fn a_wrong_request_is_told_what_would_be_right() {
    let service = Service::start(0).await;
    let refused = async |body: Value, wanted: &str| {
        let reply = service.client().post("/v1/templates", &body).await;
        let said = reply.refused(422, "invalid_field");
        assert!(said.contains(wanted), "{body}: {said}");
    };
    refused(json!({}), "name").await;
    refused(json!({ "name": "../etc" }), "name").await;
    refused(json!({ "name": "x", "from": "none" }), "from: there is no template \"none\"").await;
    refused(json!({ "name": "x", "size": 1 }), "size").await;
    refused(json!({ "name": "x", "steps": [{ "walk": 1 }] }), "steps[0]: unknown variant `walk`")
        .await;
    refused(json!({ "name": "x", "steps": [{ "run": "" }] }), "steps[0].run").await;
    refused(json!({ "name": "x", "steps": [{ "wait": {} }] }), "steps[0].wait").await;
    let copy = json!({ "dst": "/srv", "archive_sha256": "0".repeat(64) });
    refused(json!({ "name": "x", "steps": [{ "copy": copy }] }), "PUT it to /v1/inputs/000").await;
    let copy = json!({ "dst": "/srv", "archive_base64": "!" });
    refused(json!({ "name": "x", "steps": [{ "copy": copy }] }), "archive_base64").await;
    let base = json!({ "name": "base" });
    service.client().post("/v1/templates", &base).await.refused(409, "template_exists");
    let wrong = format!("/v1/inputs/{}", "0".repeat(64));
    service.client().send("PUT", &wrong, &[], "abc").await.refused(422, "invalid_field");
    service.client().get(&wrong).await.refused(404, "input_not_found");
    service.client().get("/v1/inputs/short").await.refused(422, "invalid_field");
    service.client().get("/v1/templates/x/log").await.refused(404, "template_not_found");
    service.stop().await;
}
