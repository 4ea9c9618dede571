//! Several keys: what each may do, how much it may have, and what is noted of it.

use serde_json::{Value, json};

use crate::client::Client;
use crate::service::{Service, id};

impl Service {
    /// A new key with these fields; gives a client that uses it, and its id.
    async fn key_with(&self, body: &Value) -> (Client, String) {
        let made = self.client().post("/v1/keys", body).await.expect(201);
        let key = made["key"].as_str().unwrap();
        (self.client().with_key(Some(key)), made["id"].as_str().unwrap().to_owned())
    }
}

#[tokio::test]
async fn a_key_does_what_its_scopes_say_with_what_is_its_own() {
    let mut service = Service::start(2).await;
    let (ann, ann_id) = service.key_with(&json!({ "name": "ann" })).await;
    let (bob, _) = service.key_with(&json!({ "name": "bob", "scopes": ["sandboxes"] })).await;
    let (ops, _) =
        service.key_with(&json!({ "name": "ops", "scopes": ["all_sandboxes", "pools"] })).await;
    let base = json!({ "template": "base", "timeout_seconds": 3600 });
    let made = ann.post("/v1/sandboxes", &base).await.expect(201);
    let box_id = id(&made);
    let path = format!("/v1/sandboxes/{box_id}");

    // To another key the sandbox is not there; to its own, to `ops` and to the file's key it is.
    bob.get(&path).await.refused(404, "sandbox_not_found");
    bob.post(&format!("{path}/exec"), &json!({ "argv": ["true"] }))
        .await
        .refused(404, "sandbox_not_found");
    bob.delete(&path).await.refused(404, "sandbox_not_found");
    assert_eq!(bob.get("/v1/sandboxes").await.expect(200)["items"], json!([]));
    for client in [&ann, &ops, service.client()] {
        assert_eq!(client.get(&path).await.expect(200)["id"], *box_id);
    }
    assert_eq!(ops.get("/v1/sandboxes").await.expect(200)["items"].as_array().unwrap().len(), 1);
    let scope = ops.post("/v1/sandboxes", &base).await.refused(403, "forbidden");
    assert!(scope.contains("sandboxes"), "{scope}");
    ann.json("PUT", "/v1/pools/base", &json!({ "target": 0 })).await.refused(403, "forbidden");
    ann.get("/v1/keys").await.refused(403, "forbidden");
    ops.json("PUT", "/v1/pools/base", &json!({ "target": 1 })).await.expect(200);
    assert_eq!(ann.get("/v1/templates").await.status, 200);

    // The sandbox's own token opens what is in it, and nothing else.
    let token = made["access_token"].as_str().unwrap();
    let nobody = service.client().with_key(None);
    let exec = format!("{path}/exec?buffered=true");
    let command = json!({ "argv": ["echo", "inside"] }).to_string();
    let header = [("x-access-token", token)];
    let done = nobody.send("POST", &exec, &header, command.clone()).await.expect(200);
    assert_eq!(done["stdout"], "inside\n");
    let file = format!("{path}/files?path=/etc/hostname");
    assert_eq!(service.client().with_key(Some(token)).get(&file).await.status, 200);
    nobody.send("DELETE", &path, &header, "").await.refused(401, "unauthorized");
    nobody.send("GET", "/v1/sandboxes", &header, "").await.refused(401, "unauthorized");
    let other = id(&bob.post("/v1/sandboxes", &base).await.expect(201));
    let exec = format!("/v1/sandboxes/{other}/exec");
    nobody.send("POST", &exec, &header, command).await.refused(401, "unauthorized");

    // Keys, owners and all outlive the service; a removed key opens nothing.
    service.crash().await;
    service.start_again().await;
    let (ann, bob) = (service.reach(&ann), service.reach(&bob));
    assert_eq!(id(&ann.get(&path).await.expect(200)), box_id);
    bob.get(&path).await.refused(404, "sandbox_not_found");
    let gone = service.client().delete(&format!("/v1/keys/{ann_id}")).await;
    assert_eq!(gone.status, 204);
    ann.get(&path).await.refused(401, "unauthorized");
    let again = service.client().delete(&format!("/v1/keys/{ann_id}")).await;
    again.refused(404, "key_not_found");

    // Who did what is on record, and secrets are not.
    let log = std::fs::read_to_string(service.home().path().join("audit.log")).unwrap();
    let entries: Vec<Value> = log.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let made = entries.iter().find(|e| e["made"] == *path).unwrap();
    assert_eq!((&made["actor"]["name"], &made["status"]), (&json!("ann"), &json!(201)), "{made}");
    assert!(made["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{made}");
    let refused = |e: &&Value| e["actor"]["name"] == "bob" && e["method"] == "DELETE";
    assert_eq!(entries.iter().find(refused).unwrap()["status"], 404);
    let by_token = |e: &&Value| e["actor"]["kind"] == "token" && e["status"] == 200;
    assert!(entries.iter().any(|e| by_token(&e)), "{log}");
    assert!(entries.iter().any(|e| e["actor"]["kind"] == "nobody" && e["status"] == 401));
    assert!(!log.contains(token) && !log.contains(&service.key()), "a secret in the audit log");
    let db = std::fs::read(service.home().path().join("state.db")).unwrap();
    let key = service.key();
    assert!(!db.windows(key.len()).any(|w| w == key.as_bytes()), "a key in the database");
    service.stop().await;
}

#[tokio::test]
async fn quotas_bound_what_a_key_and_the_service_may_have() {
    let config = "[limits]\nsandboxes = 3\n";
    let service = Service::start_configured(1, config).await;
    let quotas = json!({ "sandboxes": 2, "vcpus": 1 });
    let (ann, _) = service.key_with(&json!({ "name": "ann", "quotas": quotas })).await;
    let base = json!({ "template": "base", "timeout_seconds": 3600 });
    let first = id(&ann.post("/v1/sandboxes", &base).await.expect(201));
    let first = format!("/v1/sandboxes/{first}");
    let reply = ann.post("/v1/sandboxes", &base).await;
    let message = reply.refused(429, "quota_exceeded");
    assert!(message.contains("vcpus"), "{message}");
    let after: u64 = reply.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&after));

    // A paused one needs no processor, so there is room for another; but not for both.
    ann.post(&format!("{first}/pause"), &json!({})).await.expect(200);
    let second = id(&ann.post("/v1/sandboxes", &base).await.expect(201));
    ann.post(&format!("{first}/resume"), &json!({})).await.refused(429, "quota_exceeded");
    ann.delete(&format!("/v1/sandboxes/{second}")).await;
    ann.post(&format!("{first}/resume"), &json!({})).await.expect(200);
    let fork = ann.post(&format!("{first}/fork"), &json!({ "count": 1 })).await;
    assert!(fork.refused(429, "quota_exceeded").contains("vcpus"));

    // The service's own limit holds for everybody.
    service.create().await;
    service.create().await;
    let message = service.client().post("/v1/sandboxes", &base).await;
    assert!(message.refused(429, "quota_exceeded").contains("the service"));

    let quotas = json!({ "claims_per_second": 0.01 });
    let (slow, _) = service.key_with(&json!({ "name": "slow", "quotas": quotas })).await;
    ann.delete(&first).await;
    slow.post("/v1/sandboxes", &base).await.expect(201);
    let id = service.client().get("/v1/sandboxes?limit=1").await.expect(200)["items"][0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    service.client().delete(&format!("/v1/sandboxes/{id}")).await;
    let reply = slow.post("/v1/sandboxes", &base).await;
    reply.refused(429, "too_many_claims");
    assert!(reply.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() > 1);
    service.stop().await;
}

#[tokio::test]
async fn the_command_line_makes_and_removes_keys() {
    let service = Service::start(0).await;
    let made = service.cli(&["key", "create", "ci", "--max-sandboxes", "2"]).await;
    assert!(made.status.success(), "{made:?}");
    let key = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let with = service.client().with_key(Some(&key));
    assert_eq!(with.get("/v1/sandboxes").await.status, 200);
    let listed = service.cli(&["key", "ls"]).await;
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.contains("ci") && listed.contains("sandboxes=2"), "{listed}");
    assert!(!listed.contains(&key), "a key is shown once");
    let twice = service.cli(&["key", "create", "ci"]).await;
    assert_eq!(twice.status.code(), Some(1));
    assert!(service.cli(&["key", "rm", "ci"]).await.status.success());
    with.get("/v1/sandboxes").await.refused(401, "unauthorized");
    assert_eq!(service.cli(&["key", "rm", "ci"]).await.status.code(), Some(1));
    service.stop().await;
}
