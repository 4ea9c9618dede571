//! Requests that are sent again: done once, answered every time.

use serde_json::{Value, json};

use crate::client::Reply;
use crate::service::{Service, id};

async fn post(service: &Service, key: &str, path: &str, body: &Value) -> Reply {
    let headers = [("content-type", "application/json"), ("idempotency-key", key)];
    service.client().send("POST", path, &headers, body.to_string()).await
}

fn replayed(reply: &Reply) -> bool {
    reply.headers.get("idempotency-replayed").is_some_and(|v| v == "true")
}

#[tokio::test]
async fn a_request_sent_again_is_answered_and_not_done_again() {
    let mut service = Service::start(1).await;
    let body = json!({ "template": "base", "metadata": { "a": "b" } });
    let first = post(&service, "create-1", "/v1/sandboxes", &body).await;
    let made = first.expect(201);
    assert!(!replayed(&first));
    let again = post(&service, "\"create-1\"", "/v1/sandboxes", &body).await;
    assert!(replayed(&again));
    assert_eq!(again.expect(201), made, "the same reply, token and all");
    assert_eq!(again.headers.get("server-timing"), first.headers.get("server-timing"));
    let sandboxes = async |service: &Service| {
        let list = service.client().get("/v1/sandboxes").await.expect(200);
        list["items"].as_array().unwrap().len()
    };
    assert_eq!(sandboxes(&service).await, 1);
    let other = json!({ "template": "base" });
    let refused = post(&service, "create-1", "/v1/sandboxes", &other).await;
    assert!(refused.refused(422, "idempotency_key_reused").contains("create-1"));
    let path = format!("/v1/sandboxes/{}", id(&made));
    let refused = post(&service, "create-1", &format!("{path}/pause"), &json!({})).await;
    refused.refused(422, "idempotency_key_reused");

    // Over a restart; what is in the database opens nothing by itself.
    service.crash().await;
    service.start_again().await;
    let again = post(&service, "create-1", "/v1/sandboxes", &body).await;
    assert_eq!(again.expect(201), made);
    let token = made["access_token"].as_str().unwrap().as_bytes();
    for file in ["state.db", "state.db-wal"] {
        let stored = std::fs::read(service.home().path().join(file)).unwrap_or_default();
        assert!(!stored.windows(token.len()).any(|w| w == token), "a token in {file}");
    }

    // Transitions too; one that was refused changed nothing and frees its key.
    let paused = post(&service, "p", &format!("{path}/pause"), &json!({})).await;
    let again = post(&service, "p", &format!("{path}/pause"), &json!({})).await;
    assert_eq!(again.expect(200), paused.expect(200));
    let refused = post(&service, "q", &format!("{path}/pause"), &json!({})).await;
    refused.refused(409, "wrong_state");
    assert_eq!(refused.value()["state"], "paused");
    post(&service, "r", &format!("{path}/resume"), &json!({})).await.expect(200);
    let done = post(&service, "q", &format!("{path}/pause"), &json!({})).await;
    assert!(!replayed(&done) && done.status == 200, "{}", done.text());
    for key in ["", "a b", &"x".repeat(256)] {
        let refused = post(&service, key, "/v1/sandboxes", &body).await;
        assert!(refused.refused(422, "invalid_field").contains("Idempotency-Key"));
    }
    let exec = json!({ "argv": ["true"] });
    post(&service, "e", &format!("{path}/exec"), &exec).await.refused(422, "invalid_field");
    service.stop().await;
}

#[tokio::test]
async fn what_a_killed_service_could_not_answer_is_done_once_all_the_same() {
    let mut service = Service::start(1).await;
    let body = json!({ "template": "base" });
    // Sent twice at once: one is done, the other is told so or gets the reply.
    let (a, b) = tokio::join!(
        post(&service, "twice", "/v1/sandboxes", &body),
        post(&service, "twice", "/v1/sandboxes", &body)
    );
    let mut codes = [a.status, b.status];
    codes.sort_unstable();
    assert!([[201, 409], [201, 201]].contains(&codes), "{codes:?}");
    let settled = post(&service, "twice", "/v1/sandboxes", &body).await.expect(201);
    service.client().delete(&format!("/v1/sandboxes/{}", id(&settled))).await;

    // Killed when the sandbox was noted and nobody had heard of it.
    service.crash().await;
    service.start_again_with(&[("RETHAW_FAILPOINT", "claim.noted")]).await;
    service.pool_full(1).await;
    let client = service.client();
    assert_eq!(client.post_keyed_unanswered("lost", "/v1/sandboxes", &body).await, None);
    service.died().await;
    service.start_again().await;
    let list = service.client().get("/v1/sandboxes").await.expect(200);
    assert_eq!(list["items"], json!([]), "a sandbox that nobody was told of");
    let made = post(&service, "lost", "/v1/sandboxes", &body).await;
    assert!(!replayed(&made));
    assert_eq!(service.sh(&id(&made.expect(201)), "echo here").await, "here");
    service.stop().await;
}
