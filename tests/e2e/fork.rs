//! Forks: clones with the past of their source, and an identity and a future of their own.

use serde_json::json;

use crate::death::{FILL, SUM};
use crate::identity::{all_differ, clock_is_right, object_agrees};
use crate::restart::{COUNTER, counts_on};
use crate::service::{Service, id};

#[tokio::test]
async fn clones_share_the_past_and_nothing_else() {
    let service = Service::start(1).await;
    let body = json!({ "metadata": { "team": "blue" }, "env": { "E": "e" } });
    let source = id(&service.create_with(&body).await);
    let sum = service.sh(&source, FILL).await;
    let counter = service.sh(&source, COUNTER).await;
    service.sh(&source, "echo disk > /root/note").await;

    let reply = service.act(&source, "fork", &json!({ "count": 3 })).await;
    let phases = reply.headers["server-timing"].to_str().unwrap();
    let named: Vec<_> = phases.split(", ").filter_map(|p| p.split_once(";dur=")).collect();
    for phase in ["stop", "clones", "total"] {
        let took = named.iter().find(|(name, _)| *name == phase).map(|(_, ms)| ms.parse::<f64>());
        assert!(took.unwrap().unwrap() > 0.0, "{phases}");
    }
    let reply = reply.expect(201);
    let clones = reply["items"].as_array().unwrap().clone();
    assert_eq!(clones.len(), 3, "{reply}");
    let ids: Vec<_> = clones.iter().map(id).collect();
    for (clone, id) in clones.iter().zip(&ids) {
        assert_eq!((&clone["state"], &clone["origin"]), (&json!("running"), &json!("forked")));
        assert_eq!(clone["metadata"], json!({ "team": "blue" }));
        assert!(clone["access_token"].as_str().unwrap().len() >= 20);
        assert_ne!(*id, source);
    }
    // The first thing each of them does is to show what it is.
    let mut all = ids.clone();
    all.push(source.clone());
    let looks = all_differ(&service, &all).await;
    for (clone, look) in clones.iter().zip(&looks) {
        object_agrees(clone, look);
    }
    for id in &all {
        assert_eq!(service.sh(id, SUM).await, sum);
        assert_eq!(service.sh(id, "cat /root/note; echo $E").await, "disk\ne");
        let alive = service.sh(id, &format!("kill -0 {counter} && echo alive")).await;
        assert_eq!(alive, "alive");
        counts_on(&service, id).await;
        clock_is_right(&service, id).await;
    }
    // From here on each goes its own way: memory and disk.
    for id in &all {
        service.sh(id, &format!("echo {id} | tee /dev/shm/own > /root/own")).await;
    }
    for id in &all {
        assert_eq!(service.sh(id, "cat /dev/shm/own /root/own").await, format!("{id}\n{id}"));
    }

    service.client().delete(&format!("/v1/sandboxes/{source}")).await;
    for id in &ids {
        assert_eq!(service.sh(id, SUM).await, sum);
        assert_eq!(service.sh(id, "cat /root/own").await, *id);
    }
    service.stop().await;
}

#[tokio::test]
async fn clones_can_be_cloned_paused_and_taken_back() {
    let mut service = Service::start(0).await;
    let source = service.create().await;
    let sum = service.sh(&source, FILL).await;
    let fork = async |service: &Service, of: &str| {
        let reply = service.act(of, "fork", &json!({})).await.expect(201);
        assert_eq!(reply["items"].as_array().unwrap().len(), 1, "one, when no count is given");
        id(&reply["items"][0])
    };
    let child = fork(&service, &source).await;
    service.sh(&child, "echo child > /dev/shm/who").await;
    service.client().delete(&format!("/v1/sandboxes/{source}")).await;
    let grandchild = fork(&service, &child).await;
    assert_eq!(service.sh(&grandchild, "cat /dev/shm/who").await, "child");
    all_differ(&service, &[child.clone(), grandchild.clone()]).await;

    service.act(&child, "pause", &json!({})).await.expect(200);
    service.crash().await;
    service.start_again().await;
    assert_eq!(service.sh(&grandchild, SUM).await, sum);
    service.act(&child, "resume", &json!({})).await.expect(200);
    assert_eq!(service.sh(&child, SUM).await, sum);
    // Paused ones are cloned after they were resumed; what was written lives as long as its clones.
    let late = fork(&service, &child).await;
    service.client().delete(&format!("/v1/sandboxes/{child}")).await;
    service.client().delete(&format!("/v1/sandboxes/{grandchild}")).await;
    assert_eq!(service.sh(&late, SUM).await, sum);
    service.client().delete(&format!("/v1/sandboxes/{late}")).await;
    let golden = crate::home::golden_snapshots(service.home().path()).len();
    let all = std::fs::read_dir(service.home().path().join("snapshots")).unwrap().count();
    assert_eq!(all, golden, "snapshots that nobody stands on");
    service.stop().await;
}
