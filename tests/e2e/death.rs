//! Processes die under the service: VMs and the page server. What can live on does, what cannot is
//! told at once.

use serde_json::{Value, json};

use crate::exec::Frames;
use crate::service::Service;

/// Random bytes in the guest's memory; the script prints their digest.
pub const FILL: &str = "head -c 8388608 /dev/urandom > /dev/shm/blob; sha256sum < /dev/shm/blob";
pub const SUM: &str = "sha256sum < /dev/shm/blob";

#[tokio::test]
async fn a_killed_vm_ends_its_commands_and_only_its_own() {
    let service = Service::start(2).await;
    let (doomed, other) = (service.create().await, service.create().await);
    let slow = json!({ "argv": ["sh", "-c", "echo begun; sleep 3600"] });
    let mut frames = Frames::start(&service, &doomed, &slow).await;
    assert_eq!(frames.next().await.unwrap()["type"], "started");
    assert_eq!(frames.next().await.unwrap()["data"], "begun\n");
    let mut lasting = Frames::start(&service, &other, &slow).await;
    lasting.next().await.unwrap();

    let kill = async {
        // The second command runs once the guest lists it.
        service
            .until("the command runs", async || {
                let look = service.sh(&doomed, "pgrep -c -x sleep || true").await;
                (look == "2").then_some(())
            })
            .await;
        service.home().vm(&doomed).kill();
    };
    let (buffered, ()) = tokio::join!(service.try_exec(&doomed, &slow), kill);
    buffered.refused(502, "guest_unreachable");
    let rest = frames.rest().await;
    assert_eq!(rest.len(), 1, "{rest:?}");
    assert_eq!(
        (&rest[0]["type"], &rest[0]["error_code"]),
        (&json!("error"), &json!("guest_unreachable"))
    );

    service.sandbox_gone(&doomed).await;
    assert!(!service.home().vm_dir(&doomed).exists());
    service.act(&doomed, "pause", &json!({})).await.refused(404, "sandbox_not_found");
    assert_eq!(service.sh(&other, "echo here").await, "here");
    assert_eq!(lasting.next().await.unwrap()["data"], "begun\n");
    service.stop().await;
}

#[tokio::test]
async fn a_killed_parked_vm_is_replaced() {
    let service = Service::start(2).await;
    let parked = service.home().vm_ids();
    assert_eq!(parked.len(), 2);
    for id in &parked {
        service.home().vm(id).kill();
    }
    service
        .until("others are parked", async || {
            let now = service.home().vm_ids();
            (now.len() == 2 && now.iter().all(|id| !parked.contains(id))).then_some(())
        })
        .await;
    let pool = service.pool_full(2).await;
    assert_eq!(pool["misses_total"], 0);
    let id = service.create().await;
    assert_eq!(service.sh(&id, "echo alive").await, "alive");
    service.stop().await;
}

#[tokio::test]
async fn a_vm_killed_in_a_claim_costs_no_request() {
    let service = Service::start(3).await;
    // Killed and asked for at once, so that the claim may meet a VM that nobody knows to be dead.
    for id in service.home().vm_ids().iter().take(2) {
        service.home().vm(id).kill();
    }
    let id = service.create().await;
    assert_eq!(service.sh(&id, "echo alive").await, "alive");
    service.pool_full(3).await;
    service.stop().await;
}

#[tokio::test]
async fn a_killed_page_server_is_a_pause_and_no_loss() {
    let service = Service::start(1).await;
    let (one, two) = (service.create().await, service.create().await);
    let sums = [service.sh(&one, FILL).await, service.sh(&two, FILL).await];
    let count =
        "(n=0; while :; do n=$((n+1)); echo $n > /dev/shm/n; sleep 0.05; done) >&- 2>&- & echo $!";
    let counter = service.sh(&one, count).await;
    for round in 0..3 {
        let before = service.home().pager().unwrap();
        before.kill();
        let after = service.until("another page server", async || {
            service.home().pager().filter(|now| now.pid != before.pid)
        });
        let after = after.await;
        assert_ne!(before.pid, after.pid, "round {round}");
        // What was in memory, what has to be fetched, and what is new.
        assert_eq!(service.sh(&one, SUM).await, sums[0]);
        assert_eq!(service.sh(&two, SUM).await, sums[1]);
        let library =
            service.sh(&two, "python3 -c 'import decimal, json, sqlite3; print(1)'").await;
        assert_eq!(library, "1");
        let n = service.sh(&one, "cat /dev/shm/n").await;
        service
            .until("the background process goes on", async || {
                (service.sh(&one, "cat /dev/shm/n").await != n).then_some(())
            })
            .await;
        let new = service.create().await;
        assert_eq!(service.sh(&new, "echo new").await, "new");
        service.client().delete(&format!("/v1/sandboxes/{new}")).await;
    }
    assert_eq!(service.sh(&one, &format!("kill -0 {counter} && echo same")).await, "same");
    let metrics = service.client().get("/metrics").await.text();
    let takeovers = metrics.lines().find_map(|l| l.strip_prefix("rethaw_pager_takeovers_total "));
    assert_eq!(takeovers, Some("3"), "{metrics}");
    service.stop().await;
}

#[tokio::test]
async fn deleting_and_dying_at_once_leaves_nothing() {
    let service = Service::start(3).await;
    for _ in 0..3 {
        let id = service.create().await;
        let process = service.home().vm(&id);
        let path = format!("/v1/sandboxes/{id}");
        let slow = json!({ "argv": ["sleep", "3600"] });
        let kill = async { process.kill() };
        let (ran, deleted, again, ()) = tokio::join!(
            service.try_exec(&id, &slow),
            service.client().delete(&path),
            service.client().delete(&path),
            kill
        );
        // Which of them came first is open; that each is answered in its terms is not.
        assert!([404, 409, 502].contains(&ran.status), "{} {}", ran.status, ran.text());
        for reply in [deleted, again] {
            assert!([204, 404].contains(&reply.status), "{} {}", reply.status, reply.text());
        }
        service.sandbox_gone(&id).await;
        process.gone().await;
    }
    let left: Value = service.client().get("/v1/sandboxes").await.expect(200);
    assert_eq!(left["items"], json!([]));
    service.stop().await;
}
