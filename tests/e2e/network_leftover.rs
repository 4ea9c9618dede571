//! A service that was killed for good left its table and its forwarding on the host: it is shown, and
//! removed by hand or by the next service that starts, whatever became of its data.

use serde_json::Value;

use crate::network::{FLAGS, nothing_left};
use crate::service::Service;
use crate::world::{in_world, shown};

/// What `rethaw doctor` says about leftovers, where it finds any.
async fn doctor(service: &Service) -> Option<String> {
    let output = service.cli(&["doctor", "--json"]).await;
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = said["checks"].as_array().unwrap();
    let check = checks.iter().find(|c| c["name"] == "leftovers").unwrap();
    (check["ok"] == false).then(|| check["detail"].as_str().unwrap().to_owned())
}

fn table_of(service: &Service) -> String {
    let tables = shown("nft", &["list", "tables"]);
    let names: Vec<_> = tables.lines().filter_map(|l| l.strip_prefix("table inet ")).collect();
    assert_eq!(names.len(), 1, "{tables}\n{}", service.log());
    names[0].to_owned()
}

fn is_forwarding() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv4/conf/h0/forwarding").unwrap().trim() == "1"
}

/// Kills the service, then its VMs; gives the name of the table that stays.
async fn kill_for_good(mut service: Service) -> String {
    let _sandbox = service.create().await;
    let table = table_of(&service);
    let home = service.home().path().display().to_string();
    assert!(is_forwarding());
    assert_eq!(doctor(&service).await, None, "nothing of a service that runs");
    service.crash().await;
    assert_eq!(doctor(&service).await, None, "its VMs are there for the next service");
    for process in service.home().processes() {
        process.kill();
    }
    let said = service.until("the VMs are gone", async || doctor(&service).await).await;
    for part in [table.as_str(), home.as_str(), "ipv4/conf/h0/forwarding"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    table
}

#[test]
fn what_is_left_is_removed_by_hand() {
    in_world(async |_| {
        let table = kill_for_good(Service::start_with(1, FLAGS).await).await;
        // One that does not touch the host's network by itself.
        let other = Service::start(0).await;
        assert_eq!(table_of(&other), table);
        let garbage = async |args: &[&str]| {
            let output = other.cli(&[&["gc", "--json"], args].concat()).await;
            assert!(output.status.success(), "{output:?}");
            let said: Value = serde_json::from_slice(&output.stdout).unwrap();
            let mut items = said["items"].as_array().unwrap().clone();
            items.retain(|item| item["kind"] == "network");
            items
        };
        assert!(garbage(&["--older-than", "1h"]).await.is_empty(), "it is younger");
        let found = garbage(&["--dry-run", "--older-than", "1s"]).await;
        assert_eq!((found.len(), found[0]["id"].as_str()), (1, Some(table.as_str())));
        assert_eq!(table_of(&other), table, "a dry run removes nothing");
        assert_eq!(garbage(&["--older-than", "1s"]).await, found);
        nothing_left();
        assert_eq!(doctor(&other).await, None);
        other.stop().await;
    });
}

#[test]
fn what_is_left_is_removed_by_the_next_service_of_any_home() {
    in_world(async |_| {
        let table = kill_for_good(Service::start_with(1, FLAGS).await).await;
        let other = Service::start_with(0, FLAGS).await;
        assert_ne!(table_of(&other), table);
        assert!(other.log().contains(&table), "it says so:\n{}", other.log());
        assert!(is_forwarding(), "the new service needs it");
        other.stop().await;
        nothing_left();
    });
}
