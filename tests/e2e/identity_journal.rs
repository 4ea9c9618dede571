//! The journal of a clone is the clone's: its entries carry the ids of the machine they were made in,
//! and what services print still gets there.

use serde_json::{Value, json};

use crate::service::{Service, id};
use crate::templates::{build, sandbox};

/// A service that prints again and again, started before the template is frozen.
const PRINTER: &str = r#"
cat >/etc/systemd/system/printer.service <<'EOF'
[Service]
ExecStart=/bin/sh -c 'while sleep 0.2; do read id </etc/machine-id; echo printed in $$id; done'
EOF
systemctl start printer
"#;

const DAEMON: &str = "systemctl show -p MainPID --value systemd-journald";

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no {name} in {value}"))
}

/// The newest entry of this boot that `filter` lets through, once it has `wanted` in it.
async fn entry(service: &Service, id: &str, filter: &str, wanted: &str) -> Value {
    let look = format!("journalctl -q -b -o json -n 1 {filter} | grep '{wanted}' || true");
    let found = service
        .until("the entry is in the journal", async || {
            let found = service.sh(id, &look).await;
            (!found.is_empty()).then_some(found)
        })
        .await;
    serde_json::from_str(&found).unwrap()
}

/// A word for the log, and what a service prints, are entries of this very machine.
async fn journal_is_its_own(service: &Service, made: &Value) {
    let (id, identity) = (id(made), &made["identity"]);
    let machine = text(identity, "machine_id");
    let item = identity["items"].as_array().unwrap().iter().find(|i| i["item"] == "journald");
    assert_eq!(item.unwrap()["verified"], true, "{identity}");
    service.sh(&id, &format!("logger -t probe word-{machine}")).await;
    let said = entry(service, &id, "-t probe", &format!("word-{machine}")).await;
    let printed = format!("printed in {machine}");
    let printed = entry(service, &id, "-u printer", &printed).await;
    for entry in [&said, &printed] {
        assert_eq!(text(entry, "_MACHINE_ID"), machine, "{entry}");
        assert_eq!(text(entry, "_BOOT_ID"), text(identity, "boot_id").replace('-', ""), "{entry}");
        assert_eq!(text(entry, "_HOSTNAME"), text(identity, "hostname"), "{entry}");
    }
    assert_eq!(text(&printed, "_TRANSPORT"), "stdout");
    assert_eq!(service.sh(&id, "systemctl is-system-running").await, "running");
}

#[tokio::test]
async fn every_clone_writes_a_journal_of_its_own() {
    let service = Service::start(1).await;
    let steps = json!([{ "run": PRINTER }, { "check": "systemctl is-active printer" }]);
    build(&service, "printing", "base", &steps).await;
    let source = sandbox(&service, "printing").await;
    journal_is_its_own(&service, &source).await;
    let journals = service.sh(&id(&source), "ls /run/log/journal").await;
    assert_eq!(journals, text(&source["identity"], "machine_id"), "the template's are gone");

    let forked = service.act(&id(&source), "fork", &json!({ "count": 2 })).await.expect(201);
    for clone in forked["items"].as_array().unwrap() {
        journal_is_its_own(&service, clone).await;
    }

    // A pause changes nothing: it is the same machine, and the same daemon.
    let daemon = service.sh(&id(&source), DAEMON).await;
    service.act(&id(&source), "pause", &json!({})).await.expect(200);
    let back = service.act(&id(&source), "resume", &json!({})).await.expect(200);
    journal_is_its_own(&service, &back).await;
    assert_eq!(service.sh(&id(&source), DAEMON).await, daemon);
    service.stop().await;
}
