//! Where a sandbox's memory comes from: the mapped file of a template, or the page server until it
//! is no longer needed. Pause, resume and fork are the same with either.

use serde_json::json;

use crate::death::{FILL, SUM};
use crate::service::{Service, id};

async fn metric(service: &Service, name: &str) -> f64 {
    let text = service.client().get("/metrics").await.text();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}

/// The command line of a sandbox's VM.
fn command_line(service: &Service, sandbox: &str) -> String {
    let pid = service.home().vm(sandbox).pid;
    std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap()
}

#[tokio::test]
async fn clones_of_a_file_backed_template_do_all_that_others_do() {
    let service = Service::start_with(1, &["--file-backed", "base"]).await;
    let sandbox = service.create().await;
    let sum = service.sh(&sandbox, FILL).await;
    assert!(
        !command_line(&service, &sandbox).contains("share=on"),
        "it is the file that is mapped"
    );
    let faults = metric(&service, "rethaw_uffd_faults_total{kind=\"data\"}").await;
    assert!(faults < 1.0, "{faults} faults at the page server");

    // What differs from the file is found and kept, and comes back through the page server.
    service.act(&sandbox, "pause", &json!({})).await.expect(200);
    service.act(&sandbox, "resume", &json!({})).await.expect(200);
    assert_eq!(service.sh(&sandbox, SUM).await, sum);
    assert!(command_line(&service, &sandbox).contains("share=on"));

    let other = service.create().await;
    service.sh(&other, "echo kept > /dev/shm/note").await;
    let forks = service.act(&other, "fork", &json!({ "count": 2 })).await.expect(201);
    for fork in forks["items"].as_array().unwrap() {
        assert_eq!(service.sh(&id(fork), "cat /dev/shm/note").await, "kept");
    }
    assert_eq!(service.sh(&other, "python3 -c 'print(6 * 7)'").await, "42");
    service.stop().await;
}

#[tokio::test]
async fn a_sandbox_that_lives_on_no_longer_needs_the_page_server() {
    let service = Service::start_with(0, &["--graduate-after-seconds", "1"]).await;
    let sandbox = service.create().await;
    let sum = service.sh(&sandbox, FILL).await;
    service
        .until("all of its memory is in place", async || {
            (metric(&service, "rethaw_vms_graduated_total").await > 0.0).then_some(())
        })
        .await;
    assert!(metric(&service, "rethaw_uffd_graduated_pages_total").await > 0.0);
    service.home().pager().unwrap().kill();
    let faults = metric(&service, "rethaw_uffd_faults_total{kind=\"data\"}").await;
    assert_eq!(service.sh(&sandbox, SUM).await, sum);
    service.sh(&sandbox, "python3 -c 'import json, ssl, sqlite3'").await;
    let now = metric(&service, "rethaw_uffd_faults_total{kind=\"data\"}").await;
    assert!(now <= faults, "{now} faults, {faults} before");
    service.act(&sandbox, "pause", &json!({})).await.expect(200);
    service.act(&sandbox, "resume", &json!({})).await.expect(200);
    assert_eq!(service.sh(&sandbox, SUM).await, sum);
    service.stop().await;
}
