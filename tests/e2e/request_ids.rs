//! The id of a request is in the logs of everything that worked for it: page server and agent, too.

use serde_json::{Value, json};

use crate::service::{Service, id};

/// The log that the sandbox's own agent keeps.
const AGENT_LOG: &str = "cat /run/rethaw/agent.log";

async fn ask(service: &Service, request: &str, method: &str, path: &str, body: &Value) -> Value {
    let headers = [("x-request-id", request), ("content-type", "application/json")];
    let reply = service.client().send(method, path, &headers, body.to_string()).await;
    assert!([200, 201, 204].contains(&reply.status), "{}", reply.text());
    assert_eq!(reply.headers["x-request-id"], request);
    if reply.status == 204 { Value::Null } else { reply.value() }
}

async fn create(service: &Service, request: &str) -> String {
    id(&ask(service, request, "POST", "/v1/sandboxes", &json!({ "template": "base" })).await)
}

/// Waits for a line of the page server's about a VM, a request, and this.
async fn pager_says(service: &Service, vm: &str, request: &str, what: &str) {
    let (vm, request) = (format!("vm=\"{vm}\""), format!("request=\"{request}\""));
    let path = service.home().path().join("pager.log");
    service
        .until(&format!("a line with {vm} {request} {what}"), async || {
            let text = std::fs::read_to_string(&path).unwrap();
            let wanted = [&*vm, &*request, what];
            text.lines().any(|line| wanted.iter().all(|w| line.contains(w))).then_some(())
        })
        .await;
}

#[tokio::test]
async fn an_id_is_found_in_every_log() {
    let service = Service::start(1).await;
    // From the pool: made for nobody, then claimed.
    let warm = create(&service, "made-warm").await;
    pager_says(&service, &warm, "made-warm", "claimed").await;
    let path = format!("/v1/sandboxes/{warm}/exec?buffered=true");
    ask(&service, "ran-here", "POST", &path, &json!({ "argv": ["true"] })).await;
    let said = service.sh(&warm, AGENT_LOG).await;
    assert!(said.contains(" made-warm POST /claim 200 "), "{said}");
    assert!(said.contains(" ran-here POST /exec 200 "), "{said}");
    assert!(!said.contains(" /boot"), "of the template's making: {said}");

    // With nothing parked: the VM is made for the request, but for the process that may be there.
    service.set_pool(0).await;
    let restored = create(&service, "made-cold").await;
    pager_says(&service, &restored, "made-cold", "").await;
    let said = service.sh(&restored, AGENT_LOG).await;
    assert!(said.contains(" made-cold POST /identity 200 "), "{said}");
    assert!(!said.contains("made-warm"), "another VM's: {said}");

    // A page server that takes over knows whom it serves.
    service.home().pager().unwrap().kill();
    pager_says(&service, &warm, "made-warm", "taken over").await;
    pager_says(&service, &restored, "made-cold", "taken over").await;

    let path = format!("/v1/sandboxes/{warm}");
    ask(&service, "paused-it", "POST", &format!("{path}/pause"), &json!({})).await;
    ask(&service, "resumed-it", "POST", &format!("{path}/resume"), &json!({})).await;
    pager_says(&service, &warm, "resumed-it", "served").await;
    let said = service.sh(&warm, AGENT_LOG).await;
    assert!(said.contains(" paused-it POST /freeze 200 "), "{said}");
    assert!(said.contains(" resumed-it POST /resume 200 "), "{said}");
    ask(&service, "deleted-it", "DELETE", &path, &Value::Null).await;
    // Whichever the page server hears of first: the process's end, or what it was ended for.
    let text = async || std::fs::read_to_string(service.home().path().join("pager.log")).unwrap();
    service
        .until("the page server lets go of it", async || {
            let ends = |line: &str| {
                line.contains(&format!("vm=\"{warm}\""))
                    && (line.contains("ended") || line.contains("not served any more"))
                    && (line.contains("resumed-it") || line.contains("deleted-it"))
            };
            text().await.lines().any(ends).then_some(())
        })
        .await;
    service.stop().await;
}
