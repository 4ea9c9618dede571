//! Disk space: a budget that is kept, and garbage that is found.

use serde_json::json;

use super::{archive, ask, build, built, delete, sandbox, snapshots, upload};
use crate::service::{Service, id};

#[tokio::test]
async fn the_budget_is_kept() {
    let mut service = Service::start(0).await;
    let used = service.client().get("/v1/store").await.expect(200)["used_bytes"].as_u64().unwrap();
    // Room for an upload, not for a layer.
    let budget = (used >> 20) + 2;
    service.terminate().await;
    service.start_again_as(&["--disk-budget-mib", &budget.to_string()], &[]).await;
    let store = service.client().get("/v1/store").await.expect(200);
    assert_eq!(store["budget_bytes"], budget << 20);
    ask(&service, "big", "base", &json!([{ "run": "true" }])).await.expect(202);
    let failed = built(&service, "big").await;
    assert_eq!(failed["state"], "failed", "{failed}");
    assert!(failed["error"].as_str().unwrap().contains("may take"), "{failed}");
    let sandbox = service.create().await;
    service
        .sh(&sandbox, "head -c 8M /dev/urandom > /dev/shm/changed; sha256sum /dev/shm/changed")
        .await;
    service.act(&sandbox, "pause", &json!({})).await.refused(507, "disk_budget_exceeded");
    // It runs on.
    service.sh(&sandbox, "test -e /dev/shm/changed").await;

    let noise: Vec<u8> =
        (0..3_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let path = format!("/v1/inputs/{}", "0".repeat(64));
    service.client().send("PUT", &path, &[], noise).await.refused(507, "disk_budget_exceeded");
    service.terminate().await;
    service.start_again_as(&["--disk-budget-mib", "1"], &[]).await;
    ask(&service, "none", "base", &json!([])).await.refused(507, "disk_budget_exceeded");
    service.stop().await;
}

#[tokio::test]
async fn garbage_is_found_before_it_is_removed() {
    let service = Service::start(0).await;
    let golden = snapshots(&service);
    let sha256 = upload(&service, archive(&[("file", "text", 0o644)])).await;
    let steps = json!([{ "copy": { "dst": "/srv", "archive_sha256": sha256 } }]);
    build(&service, "one", "base", &steps).await;
    let a = id(&sandbox(&service, "one").await);
    assert_eq!(service.sh(&a, "cat /srv/file").await, "text");

    let collect = async |dry_run: bool, age: u64| {
        let body = json!({ "dry_run": dry_run, "older_than_seconds": age });
        service.client().post("/v1/gc", &body).await.expect(200)
    };
    assert_eq!(collect(false, 3600).await["items"], json!([]), "what just came stays");
    // As an earlier version would have left it.
    let orphan = service.home().path().join("snapshots/orphan");
    std::fs::create_dir(&orphan).unwrap();
    let golden_dir = service.home().path().join("snapshots").join(&golden[0]);
    let text = std::fs::read_to_string(golden_dir.join("manifest.json")).unwrap();
    std::fs::write(orphan.join("manifest.json"), text.replacen(&golden[0], "orphan", 1)).unwrap();
    let found = collect(true, 0).await;
    let ids: Vec<_> = found["items"].as_array().unwrap().iter().map(|g| g["id"].clone()).collect();
    assert_eq!(ids, [json!("orphan"), json!(sha256)], "{found}");
    assert!(orphan.exists());
    let said = service.cli(&["gc", "--dry-run", "--older-than", "1s"]).await;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(text.contains("orphan") && text.contains(&sha256), "{text}");
    assert_eq!(collect(false, 0).await["items"], found["items"]);
    assert!(!orphan.exists());
    service.client().get(&format!("/v1/inputs/{sha256}")).await.refused(404, "input_not_found");

    // What is needed was left alone.
    assert_eq!(service.sh(&a, "cat /srv/file").await, "text");
    let b = id(&sandbox(&service, "one").await);
    assert_eq!(service.sh(&b, "cat /srv/file").await, "text");
    for sandbox in [a, b] {
        service.client().delete(&format!("/v1/sandboxes/{sandbox}")).await.expect(204);
    }
    delete(&service, "one").await.expect(204);
    assert_eq!(snapshots(&service), golden);
    service.stop().await;
}
