//! The crash matrix: the service is killed at every named step of every operation. The next one
//! shows each sandbox serving or paused with its memory as it was, or not at all, and nothing of what
//! was being done is left.

use serde_json::{Value, json};

use crate::death::{FILL, SUM};
use crate::process;
use crate::service::{Service, id, rethaw};

/// The steps there are, from the binary itself: one that is added is tested or fails here.
fn steps() -> Vec<String> {
    let mut command = rethaw();
    command.env("RETHAW_FAILPOINT", "no-such-step").args(["serve", "--listen", "127.0.0.1:0"]);
    let home = tempfile::tempdir().unwrap();
    let done = command.arg("--home").arg(home.path()).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    let (_, list) = said.split_once("there are ").unwrap_or_else(|| panic!("{said}"));
    let (list, _) = list.split_once(", each").unwrap();
    list.split_whitespace().map(str::to_owned).collect()
}

fn steps_of(operations: &[&str]) -> Vec<String> {
    let of = |step: &String| operations.iter().any(|o| step.split('.').next() == Some(o));
    steps().into_iter().filter(of).collect()
}

/// Everything that is there belongs to a sandbox, to the pool or to the service itself.
async fn nothing_astray(service: &Service) {
    let wrong = service.until("order", async || {
        let mut known = service.home().vm_ids();
        known.extend(service.home().vms_starting());
        let dirs = service.home().vm_dirs();
        let astray: Vec<_> = dirs.into_iter().filter(|dir| !known.contains(dir)).collect();
        let mut processes = service.home().processes();
        processes.retain(|p| {
            let of = |id: &String| p.cwd == service.home().vm_dir(id);
            !p.name.starts_with("rethaw") || p.name == "rethaw-qemu" && !known.iter().any(of)
        });
        (astray.is_empty() && processes.is_empty()).then_some(())
    });
    wrong.await;
    assert_eq!(service.home().mounts(), Vec::<String>::new());
    let tmp = std::fs::read_dir(service.home().path().join("tmp")).unwrap().count();
    assert_eq!(tmp, 0, "temporary files");
}

/// Brings a sandbox to where commands run and looks at its memory; false when it is not there.
async fn serves(service: &Service, id: &str, sum: &str, step: &str) -> bool {
    let shown = service.sandbox(id).await;
    if shown.status == 404 {
        return false;
    }
    match shown.expect(200)["state"].as_str().unwrap() {
        "running" => {}
        "paused" => {
            service.act(id, "resume", &json!({})).await.expect(200);
        }
        other => panic!("{step}: {other} after a restart"),
    }
    assert_eq!(service.sh(id, SUM).await, sum, "{step}: memory");
    assert_eq!(service.sh(id, "cat /root/note").await, "kept", "{step}: disk");
    true
}

async fn opens(service: &Service, id: &str, token: &str, step: &str) {
    let path = format!("/v1/sandboxes/{id}/exec?buffered=true");
    let (nobody, body) = (service.client().with_key(None), json!({ "argv": ["true"] }).to_string());
    let done = nobody.send("POST", &path, &[("x-access-token", token)], body).await;
    assert_eq!(done.status, 200, "{step}: the token that the guest has");
}

async fn listed(service: &Service) -> Vec<String> {
    let list = service.client().get("/v1/sandboxes").await.expect(200);
    list["items"].as_array().unwrap().iter().map(id).collect()
}

async fn make(service: &Service) -> (String, String) {
    let id = service.create().await;
    let sum = service.sh(&id, FILL).await;
    service.sh(&id, "echo kept > /root/note; sync").await;
    (id, sum)
}

/// Asks for something with the service killed at `step`, and starts the next one.
async fn killed_at(service: &mut Service, step: &str, path: &str, body: &Value) {
    service.crash().await;
    service.start_again_with(&[("RETHAW_FAILPOINT", step)]).await;
    if step.starts_with("claim.") {
        service.pool_full(1).await;
    }
    let answered = service.client().post_unanswered(path, body).await;
    assert!(answered.is_none() || step.ends_with(".done"), "{step}: answered {answered:?}");
    service.died().await;
    service.start_again().await;
}

/// Nothing but templates is left on disk, and no key.
fn nothing_stored(service: &Service) {
    let golden = crate::home::golden_snapshots(service.home().path()).len();
    let all = std::fs::read_dir(service.home().path().join("snapshots")).unwrap().count();
    assert_eq!(all, golden, "snapshots that nobody stands on");
    let keys = std::fs::read_dir(service.home().path().join("keys")).unwrap().flatten();
    let keys: Vec<_> = keys.map(|e| e.file_name()).collect();
    assert!(keys.is_empty(), "keys that open nothing: {keys:?}");
}

#[tokio::test]
async fn killed_at_any_step_of_pause_resume_and_delete() {
    let mut service = Service::start(0).await;
    let (id, sum) = make(&service).await;
    for step in steps_of(&["pause", "resume"]) {
        let (action, _) = step.split_once('.').unwrap();
        if action == "resume" {
            service.act(&id, "pause", &json!({})).await.expect(200);
        }
        let path = format!("/v1/sandboxes/{id}/{action}");
        killed_at(&mut service, &step, &path, &json!({})).await;
        assert!(serves(&service, &id, &sum, &step).await, "{step}: the sandbox is lost");
        nothing_astray(&service).await;
    }
    for step in steps_of(&["delete"]) {
        for paused in [false, true] {
            let (doomed, doomed_sum) = make(&service).await;
            service.act(&doomed, "pause", &json!({})).await.expect(200);
            if !paused {
                service.act(&doomed, "resume", &json!({})).await.expect(200);
            }
            let path = format!("DELETE /v1/sandboxes/{doomed}");
            killed_at(&mut service, &step, &path, &json!({})).await;
            if serves(&service, &doomed, &doomed_sum, &step).await {
                let gone = service.client().delete(&format!("/v1/sandboxes/{doomed}")).await;
                assert_eq!(gone.status, 204, "{step}");
            }
            nothing_astray(&service).await;
        }
    }
    assert!(serves(&service, &id, &sum, "in the end").await);
    service.client().delete(&format!("/v1/sandboxes/{id}")).await;
    nothing_stored(&service);
    service.stop().await;
}

#[tokio::test]
async fn killed_at_any_step_of_claim_and_fork() {
    let mut service = Service::start(1).await;
    let (source, sum) = make(&service).await;
    for step in steps_of(&["claim", "restore", "fork"]) {
        // The steps of a restore are passed by a fork's clones, too.
        let (path, body) = match step.starts_with("claim.") {
            true => {
                let body = json!({ "template": "base", "env": {"MINE": "yes"} });
                ("/v1/sandboxes".to_owned(), body)
            }
            false => (format!("/v1/sandboxes/{source}/fork"), json!({ "count": 2 })),
        };
        killed_at(&mut service, &step, &path, &body).await;
        assert!(serves(&service, &source, &sum, &step).await, "{step}: the source is lost");
        for other in listed(&service).await {
            if other != source {
                // Promised to somebody who never heard of it: it must work all the same.
                assert_eq!(service.sh(&other, "echo here").await, "here", "{step}");
                if step.starts_with("claim.") {
                    let policies = service.home().vm(&other).policies();
                    assert_eq!(policies, [process::SCHED_OTHER].into(), "{step}");
                    // However little of the hand-over its guest had got.
                    assert_eq!(service.sh(&other, "echo $MINE").await, "yes", "{step}");
                    let token = service.sh(&other, "cat /run/rethaw/access-token").await;
                    opens(&service, &other, &token, &step).await;
                } else {
                    assert_eq!(service.sh(&other, SUM).await, sum, "{step}");
                }
                service.client().delete(&format!("/v1/sandboxes/{other}")).await;
            }
        }
        nothing_astray(&service).await;
    }
    service.client().delete(&format!("/v1/sandboxes/{source}")).await;
    nothing_stored(&service);
    service.stop().await;
}

#[tokio::test]
async fn every_step_belongs_to_an_operation_that_is_tested() {
    let tested = ["claim", "restore", "fork", "pause", "resume", "delete", "build", "template"];
    for step in steps() {
        let (operation, _) = step.split_once('.').unwrap();
        assert!(tested.contains(&operation), "{step} is tested nowhere");
    }
}
