//! `rethaw verify-identity`: the operator's own look at a template's clones.

use serde_json::Value;

use crate::service::Service;

#[tokio::test]
async fn clones_of_base_are_verified_and_removed() {
    let service = Service::start(0).await;
    let output = service.cli(&["verify-identity", "base", "--clones", "3", "--json"]).await;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&report["ok"], &report["clones"]), (&true.into(), &3.into()), "{report}");
    let samples = report["samples"].as_array().unwrap();
    for name in ["getrandom", "kernel_uuid", "machine_id", "boot_id", "mac", "python_random"] {
        let sample = samples.iter().find(|s| s["item"] == name);
        assert_eq!(sample.map(|s| &s["distinct"]), Some(&3.into()), "{name}: {report}");
    }
    // A limit nothing can keep is a fault, and the exit code says so.
    let strict = ["verify-identity", "base", "--clones", "2", "--max-clock-error=-1"];
    let output = service.cli(&strict).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("clock: "));
    let left = service.client().get("/v1/sandboxes").await.expect(200);
    assert_eq!(left["items"].as_array().map(Vec::len), Some(0), "{left}");
    service.stop().await;
}
