//! The command line against the real service.

use std::process::Output;

use serde_json::Value;

use crate::service::{Service, rethaw};

fn out(done: &Output) -> String {
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

#[track_caller]
fn fine(done: &Output) -> String {
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{}: {said}{}", done.status, out(done));
    out(done)
}

#[tokio::test]
async fn a_sandbox_by_hand() {
    let service = Service::start(1).await;
    let done = service.cli(&["run", "--", "python3", "-c", "print(6 * 7)"]).await;
    assert_eq!(fine(&done), "42");
    let done = service.cli(&["run", "--", "sh", "-c", "echo out; echo err >&2; exit 9"]).await;
    assert_eq!((done.status.code(), out(&done).as_str()), (Some(9), "out"));
    assert!(String::from_utf8_lossy(&done.stderr).contains("err"));
    let none = service.client().get("/v1/sandboxes").await.expect(200);
    assert_eq!(none["items"], Value::Array(Vec::new()), "run leaves no sandbox");

    let id = fine(&service.cli(&["run", "--detach", "--name", "web"]).await);
    assert_eq!(fine(&service.cli(&["exec", "web", "--", "hostname"]).await), format!("sbx-{id}"));
    let done = service.cli(&["exec", &id, "--", "sh", "-c", "kill -TERM $$"]).await;
    assert_eq!(done.status.code(), Some(143));
    let done = service.cli(&["exec", &id, "--", "no-such-program"]).await;
    assert_eq!(done.status.code(), Some(127));
    assert!(fine(&service.cli(&["ls"]).await).contains(&id));
    let list: Value = serde_json::from_str(&fine(&service.cli(&["ls", "--json"]).await)).unwrap();
    assert!(list.to_string().contains(&id), "{list}");

    let file = service.home().path().join("note");
    std::fs::write(&file, "from the host\n").unwrap();
    let file = file.display().to_string();
    fine(&service.cli(&["cp", &file, "web:/root/note"]).await);
    assert_eq!(service.sh(&id, "cat /root/note").await, "from the host");
    service.sh(&id, "echo from the guest > /root/answer").await;
    fine(&service.cli(&["cp", "web:/root/answer", &file]).await);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "from the guest\n");

    fine(&service.cli(&["pause", "web"]).await);
    let done = service.cli(&["exec", "web", "--", "true"]).await;
    assert_eq!(done.status.code(), Some(125), "rethaw's own failures are not the command's");
    fine(&service.cli(&["resume", "web"]).await);
    assert_eq!(
        fine(&service.cli(&["exec", "web", "--", "cat", "/root/note"]).await),
        "from the host"
    );
    fine(&service.cli(&["fork", "web"]).await);
    assert_eq!(
        service.client().get("/v1/sandboxes").await.expect(200)["items"].as_array().unwrap().len(),
        2
    );
    fine(&service.cli(&["rm", &id]).await);
    assert_ne!(service.cli(&["exec", &id, "--", "true"]).await.status.code(), Some(0));

    fine(&service.cli(&["pool", "set", "base", "0"]).await);
    service.pool_full(0).await;
    assert!(fine(&service.cli(&["pool", "ls"]).await).contains("base"));
    fine(&service.cli(&["version"]).await);
    service.stop().await;
}

#[tokio::test]
async fn the_host_is_judged_and_a_missing_service_named() {
    let doctor = rethaw().args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_str(&fine(&doctor)).unwrap();
    let checks = report["checks"].as_array().unwrap();
    for name in ["userfaultfd", "binaries", "qemu"] {
        let check = checks.iter().find(|c| c["name"] == name);
        assert!(check.is_some_and(|c| c["ok"] == true), "{name}: {report}");
    }
    assert!(checks.iter().any(|c| c["name"] == "kvm"), "{report}");
    assert!(!fine(&rethaw().arg("doctor").output().unwrap()).is_empty());

    // Nobody listens on a port that was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut ls = rethaw();
    let done = ls.arg("ls").env("RETHAW_URL", format!("http://{free}")).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.starts_with("rethaw: ") && said.contains(&free.to_string()), "{said}");
}
