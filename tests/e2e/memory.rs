//! Where a sandbox's memory comes from: the mapped file of a template, or the page server until it
//! is no longer needed.

use serde_json::json;

use crate::death::{FILL, SUM};
use crate::service::Service;

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
async fn clones_of_a_file_backed_template_map_its_memory() {
    let service = Service::start_with(1, &["--file-backed", "base"]).await;
    let sandbox = service.create().await;
    let sum = service.sh(&sandbox, FILL).await;
    assert!(
        !command_line(&service, &sandbox).contains("share=on"),
        "it is the file that is mapped"
    );
    let faults = metric(&service, "rethaw_uffd_faults_total{kind=\"data\"}").await;
    assert!(faults < 1.0, "{faults} faults at the page server");

    assert_eq!(service.sh(&sandbox, "python3 -c 'print(6 * 7)'").await, "42");

    // What QEMU cannot do with such memory is refused, and nothing is lost by having asked.
    for (action, body) in [("pause", json!({})), ("fork", json!({ "count": 2 }))] {
        let reply = service.act(&sandbox, action, &body).await;
        if action == "pause" {
            reply.refused(409, "snapshot_unsupported");
        }
        assert_eq!(service.sh(&sandbox, SUM).await, sum);
        assert_eq!(service.sandbox(&sandbox).await.expect(200)["state"], "running");
    }
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
