//! An identity that is not proven: the VM is destroyed and never handed out, the failure is counted
//! and logged with its item, and the next VM is served.

use guest_agent::wire::ITEMS;
use serde_json::json;

use crate::service::{Service, id};

/// What a guest of `base` has no use for.
const SKIPPED: [&str; 2] = ["ssh_host_keys", "hooks"];

#[tokio::test]
async fn a_vm_whose_identity_fails_is_destroyed_and_the_next_is_served() {
    let service = Service::start(0).await;
    let source = service.create().await;
    let applied = ITEMS.iter().filter(|item| !SKIPPED.contains(item));
    for (failures, item) in (1..).zip(applied) {
        let script = format!("mkdir -p /etc/rethaw; echo {item} > /etc/rethaw/fault-injection");
        service.sh(&source, &script).await;
        let reply = service.act(&source, "fork", &json!({ "count": 1 })).await.expect(201);
        let clone = &reply["items"][0];
        assert_eq!(clone["error"]["error_code"], "identity_not_proven", "{item}: {reply}");
        let message = clone["error"]["message"].as_str().unwrap();
        assert!(message.contains(item), "{item} is not named: {message}");
        assert!(clone.get("access_token").is_none(), "{reply}");
        let metrics = service.client().get("/metrics").await.text();
        let counted = format!("rethaw_identity_total{{outcome=\"failed\"}} {failures}");
        assert!(metrics.contains(&counted), "{item}: not counted:\n{metrics}");
        let logged = service.log().lines().any(|l| l.contains("ERROR") && l.contains(item));
        assert!(logged, "{item} is not in the log:\n{}", service.log());
        // Nothing of it is left: the source is the only sandbox with a VM.
        assert_eq!(service.home().vm_ids(), std::slice::from_ref(&source), "{item}");
    }
    service.sh(&source, "rm /etc/rethaw/fault-injection").await;
    let reply = service.act(&source, "fork", &json!({ "count": 1 })).await.expect(201);
    let served = id(&reply["items"][0]);
    assert_eq!(service.sh(&served, "echo served").await, "served");
    assert_eq!(service.sh(&service.create().await, "echo served").await, "served");
    service.stop().await;
}
