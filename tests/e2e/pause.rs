//! Pause and resume: the same machine comes back, as often as asked, also from another service.

use std::collections::BTreeSet;

use serde_json::json;

use crate::death::{FILL, SUM};
use crate::identity::{clock_is_right, look};
use crate::restart::{COUNTER, counts_on};
use crate::service::{Service, id};

/// A process that holds a file open that has no name any more, and answers on a pipe.
const HOLDER: &str = r#"
mkfifo /root/ask /root/answer
cat > /root/holder.py <<'END'
import os, sys
held = open("/root/held", "w+"); os.unlink("/root/held")
count = 0
while True:
    with open("/root/ask") as ask: word = ask.read().strip()
    count += 1
    held.write(word + "\n"); held.flush(); held.seek(0)
    with open("/root/answer", "w") as answer: answer.write(str(count) + ":" + held.read().replace("\n", ","))
    held.seek(0, 2)
END
setsid python3 /root/holder.py >&- 2>&- <&- & echo $!
"#;

async fn ask(service: &Service, id: &str, word: &str) -> String {
    service.sh(id, &format!("echo {word} > /root/ask; cat /root/answer")).await
}

#[tokio::test]
async fn processes_files_and_memory_survive_pauses() {
    let service = Service::start(1).await;
    let made = service.create_with(&json!({ "metadata": { "a": "b" }, "env": { "E": "e" } })).await;
    let id = id(&made);
    let sum = service.sh(&id, FILL).await;
    let counter = service.sh(&id, COUNTER).await;
    let holder = service.sh(&id, HOLDER).await;
    assert_eq!(ask(&service, &id, "start").await, "1:start,");
    service.sh(&id, "echo disk > /root/note").await;
    let first = look(&service, &id).await;
    let mut tokens = BTreeSet::from([made["access_token"].as_str().unwrap().to_owned()]);
    let mut randoms = BTreeSet::from([first["getrandom"].to_string()]);
    let mut words = "start,".to_owned();

    // Six times: from the fourth on, what was written before is merged.
    for round in 1..=6 {
        let vm = service.home().vm(&id);
        let paused = service.act(&id, "pause", &json!({})).await.expect(200);
        assert_eq!(paused["state"], "paused", "round {round}");
        assert!(paused.get("access_token").is_none());
        assert!(!vm.is_there() && !service.home().vm_dir(&id).exists(), "memory is not freed");
        let exec = json!({ "argv": ["true"] });
        service.try_exec(&id, &exec).await.refused(409, "wrong_state");
        service.act(&id, "pause", &json!({})).await.refused(409, "wrong_state");
        service.act(&id, "fork", &json!({})).await.refused(409, "wrong_state");
        let files = format!("/v1/sandboxes/{id}/files?path=/root/note");
        service.client().get(&files).await.refused(409, "wrong_state");

        let back = service.act(&id, "resume", &json!({})).await.expect(200);
        assert_eq!((&back["state"], &back["origin"]), (&json!("running"), &json!("resumed")));
        assert_eq!(back["metadata"], made["metadata"]);
        assert_eq!(back["identity"]["machine_id"], made["identity"]["machine_id"]);
        assert!(tokens.insert(back["access_token"].as_str().unwrap().to_owned()), "an old token");
        service.act(&id, "resume", &json!({})).await.refused(409, "wrong_state");

        assert_eq!(service.sh(&id, SUM).await, sum, "round {round}");
        assert_eq!(service.sh(&id, "cat /root/note; echo $E").await, "disk\ne");
        assert_eq!(
            service.sh(&id, &format!("kill -0 {counter} {holder} && echo alive")).await,
            "alive"
        );
        counts_on(&service, &id).await;
        words.push_str(&format!("round{round},"));
        let answer = ask(&service, &id, &format!("round{round}")).await;
        assert_eq!(answer, format!("{}:{words}", round + 1));
        let now = look(&service, &id).await;
        for same in ["hostname", "machine_id", "mac", "boot_id"] {
            assert_eq!(now[same], first[same], "{same}");
        }
        assert!(randoms.insert(now["getrandom"].to_string()), "random numbers again");
        clock_is_right(&service, &id).await;
        // More to write the next time, part of it over what was written the last time.
        service.sh(&id, &format!("head -c 3000000 /dev/urandom > /dev/shm/{}", round % 3)).await;
    }
    let stored = snapshots(&service);
    assert_eq!(
        stored, 2,
        "of a running sandbox only what it stands on is kept, besides the template"
    );
    service.client().delete(&format!("/v1/sandboxes/{id}")).await;
    assert_eq!(snapshots(&service), 1, "a deleted sandbox leaves nothing on disk");
    service.stop().await;
}

fn snapshots(service: &Service) -> usize {
    std::fs::read_dir(service.home().path().join("snapshots")).unwrap().count()
        - golden(service).saturating_sub(1)
}

/// Snapshots of templates; the shared cache may hold those of other versions, too.
fn golden(service: &Service) -> usize {
    crate::home::golden_snapshots(service.home().path()).len()
}

#[tokio::test]
async fn what_is_paused_comes_back_from_another_service() {
    let mut service = Service::start(0).await;
    let id = service.create().await;
    let sum = service.sh(&id, FILL).await;
    let counter = service.sh(&id, COUNTER).await;
    let first = look(&service, &id).await;
    for killed in [false, true, false] {
        service.act(&id, "pause", &json!({})).await.expect(200);
        if killed {
            service.crash().await;
        } else {
            service.terminate().await;
        }
        service.start_again().await;
        let shown = service.sandbox(&id).await.expect(200);
        assert_eq!(shown["state"], "paused");
        let list = service.client().get("/v1/sandboxes").await.expect(200);
        assert_eq!(list["items"][0]["id"], *id);
        let back = service.act(&id, "resume", &json!({})).await.expect(200);
        assert_eq!(back["identity"]["mac"], first["mac"]);
        assert_eq!(service.sh(&id, SUM).await, sum);
        assert_eq!(service.sh(&id, &format!("kill -0 {counter} && echo same")).await, "same");
        counts_on(&service, &id).await;
        assert_eq!(look(&service, &id).await["machine_id"], first["machine_id"]);
    }
    // One that was resumed, killed with its service and taken back can be paused again.
    service.crash().await;
    service.start_again().await;
    service.act(&id, "pause", &json!({})).await.expect(200);
    service.act(&id, "resume", &json!({})).await.expect(200);
    assert_eq!(service.sh(&id, SUM).await, sum);
    service.act(&id, "pause", &json!({})).await.expect(200);
    assert_eq!(service.client().delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
    service.sandbox(&id).await.refused(404, "sandbox_not_found");
    assert_eq!(snapshots(&service), 1);
    service.stop().await;
}

#[tokio::test]
async fn transitions_asked_for_at_once_happen_one_after_the_other() {
    let service = Service::start(1).await;
    let id = service.create().await;
    let sum = service.sh(&id, FILL).await;
    let nothing = json!({});
    let pauses = (0..3).map(|_| service.act(&id, "pause", &nothing));
    let mut codes: Vec<_> =
        futures_util::future::join_all(pauses).await.iter().map(|r| r.status).collect();
    codes.sort_unstable();
    assert_eq!(codes, [200, 409, 409]);
    let resumes = (0..3).map(|_| service.act(&id, "resume", &nothing));
    let mut codes: Vec<_> =
        futures_util::future::join_all(resumes).await.iter().map(|r| r.status).collect();
    codes.sort_unstable();
    assert_eq!(codes, [200, 409, 409]);
    assert_eq!(service.sh(&id, SUM).await, sum);
    // A command under way when its sandbox is paused is told so, and its process goes on after.
    let slow = json!({ "argv": ["sh", "-c", "echo $$ > /root/pid; exec sleep 3600"] });
    let pause = async {
        service
            .until("it runs", async || {
                let pid = service.sh(&id, "cat /root/pid 2>/dev/null || true").await;
                (!pid.is_empty()).then_some(())
            })
            .await;
        service.act(&id, "pause", &nothing).await.expect(200);
    };
    let (cut_off, ()) = tokio::join!(service.try_exec(&id, &slow), pause);
    cut_off.refused(502, "guest_unreachable");
    service.act(&id, "resume", &nothing).await.expect(200);
    assert_eq!(service.sh(&id, "echo here").await, "here");
    service.stop().await;
}

/// Ten; `RETHAW_TEST_CYCLES=200` for a soak.
fn cycles() -> usize {
    let set = std::env::var("RETHAW_TEST_CYCLES").ok();
    set.and_then(|n| n.parse().ok()).unwrap_or(10)
}

#[tokio::test]
async fn rapid_cycles_lose_nothing() {
    let service = Service::start(0).await;
    let id = service.create().await;
    let sum = service.sh(&id, FILL).await;
    let counter = service.sh(&id, COUNTER).await;
    let holder = service.sh(&id, HOLDER).await;
    for round in 1..=cycles() {
        service.act(&id, "pause", &json!({})).await.expect(200);
        service.act(&id, "resume", &json!({})).await.expect(200);
        // The disk and the memory change a little, and the big part has to be read through all.
        let script = format!("echo {round} >> /root/rounds; {SUM}; wc -l < /root/rounds");
        assert_eq!(service.sh(&id, &script).await, format!("{sum}\n{round}"));
    }
    assert_eq!(
        service.sh(&id, &format!("kill -0 {counter} {holder} && echo alive")).await,
        "alive"
    );
    counts_on(&service, &id).await;
    assert_eq!(snapshots(&service), 2);
    assert_eq!(service.home().vm_dirs().iter().filter(|dir| **dir == id).count(), 1);
    service.client().delete(&format!("/v1/sandboxes/{id}")).await;
    assert_eq!(snapshots(&service), 1);
    service.stop().await;
}

#[tokio::test]
async fn an_idle_sandbox_is_paused_and_one_in_use_is_not() {
    let service = Service::start(0).await;
    let made =
        service.create_with(&json!({ "idle_timeout_seconds": 6, "on_timeout": "pause" })).await;
    assert_eq!(made["idle_timeout_seconds"], 6);
    let id = id(&made);
    let sum = service.sh(&id, FILL).await;
    // Longer than the limit, and in use all the time.
    service.exec(&id, &json!({ "argv": ["sleep", "8"] })).await;
    assert_eq!(service.sandbox(&id).await.expect(200)["state"], "running");
    let paused = async |service: &Service| {
        service
            .until("the idle sandbox is paused", async || {
                (service.sandbox(&id).await.expect(200)["state"] == "paused").then_some(())
            })
            .await;
    };
    paused(&service).await;
    // It has no end while it is paused; the time starts anew when it comes back.
    let timeout = json!({ "timeout_seconds": 100 });
    let refused = service.act(&id, "timeout", &timeout).await;
    refused.refused(409, "wrong_state");
    assert_eq!(refused.value()["state"], "paused");
    service.act(&id, "resume", &json!({})).await.expect(200);
    assert_eq!(service.sh(&id, SUM).await, sum);
    paused(&service).await;
    let wrong = json!({ "template": "base", "idle_timeout_seconds": 0 });
    let refused = service.client().post("/v1/sandboxes", &wrong).await;
    assert!(refused.refused(422, "invalid_field").contains("idle_timeout_seconds"));
    service.stop().await;
}
