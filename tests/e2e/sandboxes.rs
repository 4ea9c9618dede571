//! Sandboxes come, are listed, and go; pools keep up with them.

use serde_json::{Value, json};

use crate::process;
use crate::service::{Service, id};

fn ids(list: &Value) -> Vec<String> {
    list["items"].as_array().unwrap().iter().map(id).collect()
}

#[tokio::test]
async fn a_sandbox_is_made_shown_and_deleted() {
    let service = Service::start(1).await;
    let made = service
        .create_with(&json!({
            "metadata": { "owner": "ann" }, "env": { "GREETING": "hello there" },
            "timeout_seconds": 600,
        }))
        .await;
    let id = id(&made);
    assert_eq!(made["template"], "base");
    assert_eq!(made["state"], "running");
    assert_eq!(made["origin"], "warm");
    assert_eq!(made["metadata"], json!({ "owner": "ann" }));
    assert_eq!(made["timeout_seconds"], 600);
    assert!(made["timings_ms"]["total"].as_f64().unwrap() > 0.0, "{made}");
    assert!(made["access_token"].as_str().unwrap().len() >= 20, "{made}");
    for time in ["created_at", "expires_at"] {
        assert!(made[time].as_str().unwrap().ends_with('Z'), "{time}: {made}");
    }

    let shown = service.sandbox(&id).await.expect(200);
    assert!(shown.get("access_token").is_none(), "a token is shown once: {shown}");
    for same in ["id", "identity", "created_at", "expires_at", "metadata"] {
        assert_eq!(shown[same], made[same], "{same}");
    }
    // The environment of the sandbox is that of its commands, and each may have more.
    assert_eq!(service.sh(&id, "echo $GREETING").await, "hello there");

    let before = service.sandbox(&id).await.expect(200)["expires_at"].clone();
    let longer = service.act(&id, "timeout", &json!({ "timeout_seconds": 7200 })).await.expect(200);
    assert!(longer["expires_at"].as_str() > before.as_str(), "{before} {longer}");

    let process = service.home().vm(&id);
    let path = format!("/v1/sandboxes/{id}");
    assert_eq!(service.client().delete(&path).await.status, 204);
    assert!(!process.is_there(), "the VM outlived its sandbox");
    assert!(!service.home().vm_dir(&id).exists());
    service.sandbox(&id).await.refused(404, "sandbox_not_found");
    service.client().delete(&path).await.refused(404, "sandbox_not_found");
    service.try_exec(&id, &json!({ "argv": ["true"] })).await.refused(404, "sandbox_not_found");
    service.stop().await;
}

#[tokio::test]
async fn lists_come_in_pages_and_by_metadata() {
    let service = Service::start(0).await;
    let mut made = Vec::new();
    for n in 0..5 {
        let metadata =
            json!({ "n": n.to_string(), "kind": if n % 2 == 0 { "even" } else { "odd" } });
        made.push(id(&service.create_with(&json!({ "metadata": metadata })).await));
    }
    made.reverse();
    let all = service.client().get("/v1/sandboxes").await.expect(200);
    assert_eq!(ids(&all), made, "newest first");
    assert!(all["next_token"].is_null());

    let (mut pages, mut path) = (Vec::new(), "/v1/sandboxes?limit=2".to_owned());
    loop {
        let page = service.client().get(&path).await.expect(200);
        pages.push(ids(&page));
        match page["next_token"].as_str() {
            Some(token) => path = format!("/v1/sandboxes?limit=2&next_token={token}"),
            None => break,
        }
        assert!(pages.len() < 5, "{pages:?}");
    }
    assert_eq!(pages, [&made[..2], &made[2..4], &made[4..]]);

    let even = service.client().get("/v1/sandboxes?metadata.kind=even").await.expect(200);
    assert_eq!(ids(&even), [&*made[0], &made[2], &made[4]]);
    let one = service.client().get("/v1/sandboxes?metadata.kind=odd&metadata.n=3&template=base");
    assert_eq!(ids(&one.await.expect(200)), [&*made[1]]);
    let none = service.client().get("/v1/sandboxes?metadata.kind=prime").await.expect(200);
    assert_eq!(ids(&none), Vec::<String>::new());
    for (wrong, status, code) in [
        ("limit=0", 422, "invalid_field"),
        ("limit=101", 422, "invalid_field"),
        ("limit=many", 400, "malformed_request"),
        ("next_token=rubbish", 422, "invalid_field"),
        ("order=size", 422, "invalid_field"),
    ] {
        let reply = service.client().get(&format!("/v1/sandboxes?{wrong}")).await;
        let message = reply.refused(status, code);
        let name = wrong.split('=').next().unwrap();
        assert!(message.contains(name), "{wrong}: {message}");
    }
    service.stop().await;
}

#[tokio::test]
async fn pools_refill_and_an_empty_one_restores_on_the_spot() {
    let service = Service::start(2).await;
    let pools = service.client().get("/v1/pools").await.expect(200);
    assert_eq!(
        pools["items"],
        json!([{ "template": "base", "target": 2, "ready": 2, "restoring": 0, "claimed": 0,
                 "misses_total": 0 }])
    );
    let warm = service.create_with(&json!({})).await;
    assert_eq!(warm["origin"], "warm");
    let pool = service.pool_full(2).await;
    assert_eq!((&pool["claimed"], &pool["misses_total"]), (&json!(1), &json!(0)));

    service.set_pool(0).await;
    let restored = service.create_with(&json!({})).await;
    assert_eq!(restored["origin"], "restored");
    assert_eq!(service.sh(&id(&restored), "hostname").await, restored["identity"]["hostname"]);
    let pool = service.pool_full(0).await;
    assert_eq!((&pool["claimed"], &pool["misses_total"]), (&json!(2), &json!(1)));
    // Parked VMs that are not wanted any more are gone, not merely unlisted.
    assert_eq!(service.home().vm_ids().len(), 2);

    service.set_pool(3).await;
    assert_eq!(service.create_with(&json!({})).await["origin"], "warm");
    service.stop().await;
}

#[tokio::test]
async fn a_vm_can_be_claimed_before_it_is_parked() {
    let service = Service::start(0).await;
    let refilled = "rethaw_pool_refill_duration_seconds_count{template=\"base\"} 1";
    let target = json!({ "target": 1 });
    service.client().json("PUT", "/v1/pools/base", &target).await.expect(200);
    service
        .until("a VM can be claimed", async || {
            let metrics = service.client().get("/metrics").await.text();
            metrics.lines().any(|line| line == refilled).then_some(())
        })
        .await;
    let pool = service.client().get("/v1/pools/base").await.expect(200);
    assert_eq!((&pool["ready"], &pool["restoring"]), (&json!(0), &json!(1)), "it settles");
    let made = service.create_with(&json!({})).await;
    assert_eq!(made["origin"], "warm");
    assert_eq!(service.sh(&id(&made), "hostname").await, made["identity"]["hostname"]);
    // Its place is filled again, and nobody parks a VM that is somebody's.
    service.pool_full(1).await;
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(service.sh(&id(&made), "echo alive").await, "alive");
    service.stop().await;
}

#[tokio::test]
async fn a_vm_goes_first_only_while_it_is_handed_over() {
    let service = Service::start(1).await;
    service.pool_full(1).await;
    let parked = service.home().vm_ids();
    let vm = service.home().vm(&parked[0]);
    assert_eq!(vm.policies(), [process::SCHED_RR].into(), "ready to be handed over");
    let made = service.create_with(&json!({})).await;
    assert_eq!(id(&made), parked[0]);
    let ordinary = async || (vm.policies() == [process::SCHED_OTHER].into()).then_some(());
    service.until("it is scheduled as any other", ordinary).await;
    service.stop().await;
}

#[tokio::test]
async fn time_up_means_killed_or_paused_as_asked() {
    let service = Service::start(2).await;
    let killed = id(&service.create_with(&json!({ "timeout_seconds": 1 })).await);
    let process = service.home().vm(&killed);
    let kept = service.create_with(&json!({ "timeout_seconds": 2, "on_timeout": "pause" })).await;
    let kept = id(&kept);
    service.sh(&kept, "echo still here > /root/note").await;

    service.sandbox_gone(&killed).await;
    process.gone().await;
    service
        .until("the sandbox is paused", async || {
            let now = service.sandbox(&kept).await.expect(200);
            (now["state"] == "paused").then_some(())
        })
        .await;
    let back = service.act(&kept, "resume", &json!({ "timeout_seconds": 600 })).await.expect(200);
    assert_eq!((&back["state"], &back["origin"]), (&json!("running"), &json!("resumed")));
    assert_eq!(service.sh(&kept, "cat /root/note").await, "still here");
    service.stop().await;
}

#[tokio::test]
async fn the_service_says_how_it_is() {
    let service = Service::start(1).await;
    // Health and metrics are for machines that have no key.
    let anybody = service.client().with_key(None);
    assert_eq!(anybody.get("/healthz").await.expect(200)["status"], "ok");
    let ready = anybody.get("/readyz").await.expect(200);
    assert_eq!(ready["checks"]["template:base"]["state"], "ready");
    service.create().await;
    let metrics = anybody.get("/metrics").await;
    assert_eq!(metrics.status, 200);
    assert!(
        metrics.text().contains("rethaw_sandbox_acquire_duration_seconds"),
        "{}",
        metrics.text()
    );
    let info = service.client().get("/v1/info").await.expect(200);
    assert_eq!(info["name"], "rethaw");
    assert!(info["version"].is_string() && info["vmm"].is_string(), "{info}");

    let template = service.client().get("/v1/templates/base").await.expect(200);
    assert_eq!(template["state"], "ready");
    for phase in ["kernel_ms", "userspace_ms", "total_ms"] {
        let took = template["snapshot"]["boot_ms"][phase].as_f64().unwrap();
        assert!(took > 0.0, "{phase}: {template}");
    }
    let templates = service.client().get("/v1/templates").await.expect(200);
    assert_eq!(templates["items"][0]["name"], "base");
    service.client().get("/v1/templates/nope").await.refused(404, "template_not_found");
    service.client().get("/v1/pools/nope").await.refused(404, "pool_not_found");
    service.stop().await;
}
