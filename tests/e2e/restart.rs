//! The service itself ends: killed, it loses nothing that was promised; told to stop, it leaves
//! nothing behind.

use std::process::Stdio;

use serde_json::{Value, json};

use crate::client::within;
use crate::death::{FILL, SUM};
use crate::service::{Service, id, rethaw};

/// A command in the guest that outlives the request that started it; gives its pid.
pub const COUNTER: &str =
    "(n=0; while :; do n=$((n+1)); echo $n > /dev/shm/n; sleep 0.05; done) >&- 2>&- & echo $!";

/// Waits until the counter has moved.
pub async fn counts_on(service: &Service, id: &str) {
    let n = service.sh(id, "cat /dev/shm/n").await;
    service
        .until("the counter moves", async || {
            let now = service.sh(id, "cat /dev/shm/n").await;
            (!now.is_empty() && now != n).then_some(())
        })
        .await;
}

fn without_timings(mut sandbox: Value) -> Value {
    sandbox.as_object_mut().unwrap().remove("timings_ms");
    sandbox
}

#[tokio::test]
async fn a_killed_service_takes_its_sandboxes_back() {
    let mut service = Service::start(2).await;
    let made = service.create_with(&json!({ "metadata": { "a": "b" }, "env": { "E": "e" } })).await;
    let kept = id(&made);
    let sum = service.sh(&kept, FILL).await;
    let counter = service.sh(&kept, COUNTER).await;
    let vm = service.home().vm(&kept);
    let pager = service.home().pager().unwrap();
    let before = service.sandbox(&kept).await.expect(200);
    service.pool_full(2).await;
    let parked: Vec<_> = service.home().vm_ids().into_iter().filter(|id| *id != kept).collect();
    assert_eq!(parked.len(), 2);
    let parked: Vec<_> = parked.iter().map(|id| service.home().vm(id)).collect();

    for _ in 0..2 {
        service.crash().await;
        assert!(vm.is_there(), "the VM died with the service");
        service.start_again().await;
        let after = service.sandbox(&kept).await.expect(200);
        assert_eq!(without_timings(after), without_timings(before.clone()));
        assert_eq!(service.home().vm(&kept).pid, vm.pid);
        assert_eq!(service.sh(&kept, SUM).await, sum);
        assert_eq!(service.sh(&kept, &format!("kill -0 {counter} && echo $E")).await, "e");
        counts_on(&service, &kept).await;
    }
    assert_eq!(service.home().pager().map(|p| p.pid), Some(pager.pid), "it served on");
    for vm in parked {
        vm.gone().await;
    }
    service.pool_full(2).await;
    assert_eq!(service.home().vm_ids().len(), 3, "{:?}", service.home().vm_ids());
    // Three VMs, the page server, the service: nothing else runs here but what is on its way.
    let starting = service.home().vms_starting();
    let starting: Vec<_> = starting.iter().map(|id| service.home().vm_dir(id)).collect();
    let mut processes = service.home().processes();
    processes.retain(|process| !starting.contains(&process.cwd));
    assert_eq!(processes.len(), 5, "{processes:#?}");
    assert_eq!(service.create_with(&json!({})).await["origin"], "warm");
    assert_eq!(service.client().delete(&format!("/v1/sandboxes/{kept}")).await.status, 204);
    vm.gone().await;
    service.stop().await;
}

#[tokio::test]
async fn a_sandbox_that_died_meanwhile_is_gone_after_the_restart() {
    let mut service = Service::start(0).await;
    let (dead, late, kept) =
        (service.create().await, service.create().await, service.create().await);
    service.act(&late, "timeout", &json!({ "timeout_seconds": 1 })).await.expect(200);
    let late_vm = service.home().vm(&late);
    service.crash().await;
    let vm = service.home().vm(&dead);
    vm.kill();
    vm.gone().await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    service.start_again().await;
    service.sandbox(&dead).await.refused(404, "sandbox_not_found");
    // Its time was up while nobody was there to see it.
    service.sandbox_gone(&late).await;
    late_vm.gone().await;
    assert_eq!(service.sh(&kept, "echo here").await, "here");
    assert_eq!(service.home().vm_ids(), [kept]);
    service.stop().await;
}

#[tokio::test]
async fn the_template_outlives_the_last_sandbox_whatever_the_hour() {
    let mut service = Service::start(0).await;
    let only = service.create().await;
    let template = service.client().get("/v1/templates/base").await.expect(200);
    let snapshot = template["snapshot"]["id"].as_str().unwrap().to_owned();
    service.act(&only, "timeout", &json!({ "timeout_seconds": 1 })).await.expect(200);
    service.crash().await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    // It is removed in the first moments of the next service, before the template is known again.
    service.start_again().await;
    service.sandbox_gone(&only).await;
    assert!(service.home().path().join("snapshots").join(&snapshot).join("manifest.json").exists());
    let template = service.client().get("/v1/templates/base").await.expect(200);
    assert_eq!(template["snapshot"]["id"], snapshot.as_str());
    service.create().await;
    service.stop().await;
}

#[tokio::test]
async fn service_and_page_server_killed_together_leave_no_hang_and_no_orphan() {
    let mut service = Service::start(1).await;
    let id = service.create().await;
    let sum = service.sh(&id, FILL).await;
    let vm = service.home().vm(&id);
    let pager = service.home().pager().unwrap();
    service.crash().await;
    pager.kill();
    service.start_again().await;
    // The memory that was never fetched may be lost with both; then the sandbox must be, too. What
    // is still shown must work.
    if service.sandbox(&id).await.status == 200 {
        let reply = service.try_exec(&id, &json!({ "argv": ["sh", "-c", SUM] })).await;
        if reply.status == 200 {
            assert_eq!(reply.value()["stdout"].as_str().map(str::trim), Some(&*sum));
        } else {
            reply.refused(502, "guest_unreachable");
            service.sandbox_gone(&id).await;
        }
    }
    if service.sandbox(&id).await.status == 404 {
        vm.gone().await;
    }
    let new = service.create().await;
    assert_eq!(service.sh(&new, "python3 -c 'print(6 * 7)'").await, "42");
    service.stop().await;
}

#[tokio::test]
async fn told_to_stop_it_ends_everything_but_what_is_paused() {
    let mut service = Service::start(2).await;
    let (running, paused) = (service.create().await, service.create().await);
    service.sh(&paused, "echo kept > /root/note").await;
    service.act(&paused, "pause", &json!({})).await.expect(200);
    // A request that would take an hour does not hold it up.
    let slow = json!({ "argv": ["sleep", "3600"] });
    let mut frames = crate::exec::Frames::start(&service, &running, &slow).await;
    frames.next().await.unwrap();
    service.terminate().await;
    service.nothing_left();
    drop(frames);

    service.start_again().await;
    service.sandbox(&running).await.refused(404, "sandbox_not_found");
    assert_eq!(service.sandbox(&paused).await.expect(200)["state"], "paused");
    service.act(&paused, "resume", &json!({})).await.expect(200);
    assert_eq!(service.sh(&paused, "cat /root/note").await, "kept");
    service.stop().await;
}

#[tokio::test]
async fn sandboxes_outlive_an_upgrade_when_asked_to() {
    let mut service = Service::start_with(1, &["--keep-vms"]).await;
    let id = service.create().await;
    let sum = service.sh(&id, FILL).await;
    service.sh(&id, COUNTER).await;
    let vm = service.home().vm(&id);
    service.pool_full(1).await;
    service.terminate().await;
    assert!(vm.is_there(), "the VM went with the service");
    assert_eq!(service.home().vm_dirs(), [&*id], "parked VMs are nobody's");
    service.start_again().await;
    assert_eq!(service.home().vm(&id).pid, vm.pid);
    assert_eq!(service.sh(&id, SUM).await, sum);
    counts_on(&service, &id).await;
    assert_eq!(service.client().delete(&format!("/v1/sandboxes/{id}")).await.status, 204);
    vm.gone().await;
    service.terminate().await;
}

#[tokio::test]
async fn a_second_service_on_one_home_is_refused() {
    let service = Service::start(1).await;
    let mut second = rethaw();
    second.args(["serve", "--listen", "127.0.0.1:0", "--home"]).arg(service.home().path());
    second.stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = tokio::task::spawn_blocking(move || second.output().unwrap());
    let done = within("the second service", run).await.unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("another rethaw service already uses"), "{said}");
    assert!(said.contains(&service.home().path().display().to_string()), "{said}");
    // The first one is none the worse for it.
    let id = service.create().await;
    assert_eq!(service.sh(&id, "echo fine").await, "fine");

    // Neither does an address in use end in anything but a word.
    let mut third = rethaw();
    let address = service.client().url().trim_start_matches("http://").to_owned();
    let home = tempfile::tempdir().unwrap();
    third.args(["serve", "--listen", &address, "--home"]).arg(home.path());
    third.stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = tokio::task::spawn_blocking(move || third.output().unwrap());
    let done = within("the third service", run).await.unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains(&address), "{said}");
    service.stop().await;
}
