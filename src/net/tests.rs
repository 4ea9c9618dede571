//! Slots with real packets, in network namespaces that stand in for the host.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use snapshotter::tap;
use tokio::sync::watch;

use super::plan::{CANDIDATES, Plan, SLOTS};
use super::policy::{Limits, Policy};
use super::slot::Slot;
use super::{Addresses, NOTE, Network, NetworkConfig, leftover};

fn plan() -> Plan {
    Plan::new("/test", CANDIDATES[0], false)
}

#[test]
fn a_slot_is_made_and_goes_with_its_descriptor() {
    tap::new_namespace(|| {
        let plan = plan();
        let slot = Slot::make(&plan, 7, &[]).unwrap();
        slot.attach([2, 0, 0, 0, 0, 7]).unwrap();
        slot.set_policy(&Policy::default()).unwrap();
        let name = plan.link(7);
        let there =
            || std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains(&name);
        assert!(there());
        let again = Slot::make(&plan, 7, &[]).unwrap_err();
        assert_eq!(again.kind(), std::io::ErrorKind::AlreadyExists, "{again}");
        drop(slot);
        let started = Instant::now();
        while there() {
            assert!(started.elapsed() < Duration::from_secs(60), "the cable stays");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    })
    .unwrap();
}

/// A network on a stand-in for the host, and its names for links.
async fn with_network(test: impl AsyncFnOnce(Arc<Network>, watch::Sender<u32>)) {
    let state = tempfile::tempdir().unwrap();
    let home = state.path().to_owned();
    let note = home.join(format!("own{NOTE}"));
    let config = NetworkConfig { home, note: note.clone(), ..NetworkConfig::default() };
    let network = Network::start(config).await.unwrap();
    let claims = watch::Sender::new(0);
    let ready = tokio::spawn(Arc::clone(&network).keep_ready(claims.subscribe()));
    test(Arc::clone(&network), claims.clone()).await;
    network.close();
    ready.await.unwrap();
    network.take_down().await;
    // Every number is to be had again.
    assert_eq!(super::lock(&network.free).len(), usize::from(SLOTS) - 1);
    let started = Instant::now();
    let links = || std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    while links().contains(" rt") {
        assert!(started.elapsed() < Duration::from_secs(60), "{}", links());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let tables = std::process::Command::new("nft").args(["list", "tables"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&tables.stdout), "");
    assert!(!note.exists());
}

fn in_namespace(test: impl AsyncFnOnce(Arc<Network>) + Send) {
    in_namespace_with_claims(async |network, _| test(network).await);
}

/// The same for a test that says how many claims are under way.
fn in_namespace_with_claims(test: impl AsyncFnOnce(Arc<Network>, watch::Sender<u32>) + Send) {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(with_network(test));
        Ok(())
    };
    tap::new_namespace(run).unwrap();
}

#[test]
fn fifty_slots_at_once_share_nothing_and_leave_nothing() {
    in_namespace_with_claims(async |network, claims| {
        let held = Arc::new(Mutex::new(HashSet::new()));
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..50_u8 {
            let (network, held) = (Arc::clone(&network), Arc::clone(&held));
            let claims = claims.clone();
            tasks.spawn(async move {
                for round in 0..2_u8 {
                    let mac = format!("02:00:00:00:{round:02x}:{n:02x}");
                    // Slots are made ahead only between claims.
                    claims.send_modify(|under_way| *under_way += 1);
                    let lease = network.take(&mac, None).await.unwrap();
                    let address = lease.addresses().ipv4;
                    assert!(held.lock().unwrap().insert(address), "{address} is shared");
                    let policy = if n % 2 == 0 { Policy::default() } else { Policy::closed() };
                    lease.rules().set_policy(&policy).await.unwrap();
                    claims.send_modify(|under_way| *under_way -= 1);
                    let counted = lease.rules().counters().await.unwrap();
                    assert!(counted.iter().any(|(name, _)| name == "denied"), "{counted:?}");
                    tokio::task::yield_now().await;
                    held.lock().unwrap().remove(&address);
                    drop(lease);
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        assert_eq!(network.slots().1, 0);
        assert!(network.counted().contains_key("spoofed"));
    });
}

#[test]
fn the_same_addresses_come_back_unless_another_has_them() {
    in_namespace(async |network| {
        let mac = "02:00:00:00:00:0a";
        let before = {
            let lease = network.take(mac, None).await.unwrap();
            lease.addresses().clone()
        };
        // The kernel takes a moment to forget a namespace.
        let again = async || loop {
            let lease = network.take(mac, Some(&before)).await.unwrap();
            if *lease.addresses() == before {
                return lease;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let lease = tokio::time::timeout(Duration::from_secs(10), again()).await.unwrap();
        let other = network.take(mac, Some(&before)).await.unwrap();
        assert_ne!(other.addresses().slot, before.slot, "it is taken");
        network.keep(lease, mac);
        let other = network.take("02:00:00:00:00:0b", Some(&before)).await.unwrap();
        assert_ne!(other.addresses().slot, before.slot, "it is kept for another");
        let lease = network.take(mac, Some(&before)).await.unwrap();
        assert_eq!(*lease.addresses(), before, "at once");
        drop(lease);
        let foreign = Addresses { ipv4: "192.0.2.2".parse().unwrap(), ..before };
        let other = network.take(mac, Some(&foreign)).await.unwrap();
        assert_ne!(*other.addresses(), foreign, "of another plan");
    });
}

#[test]
fn only_what_nobody_needs_is_left_over() {
    in_namespace(async |network| {
        let note = network.host.note_path().to_owned();
        let folder = note.parent().unwrap();
        let left = || -> Vec<String> {
            leftover::find(folder).unwrap().into_iter().map(|left| left.table).collect()
        };
        let none = Vec::<String>::new();
        let lease = network.take("02:00:00:00:00:0b", None).await.unwrap();
        assert_eq!(left(), none, "its service runs");
        // As if a process before this one had written it.
        let mut text: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&note).unwrap()).unwrap();
        let started = text["owner"]["process"]["start_time"].as_u64().unwrap();
        text["owner"]["process"]["start_time"] = (started - 1).into();
        std::fs::write(&note, text.to_string()).unwrap();
        assert_eq!(left(), none, "a VM has a slot");
        leftover::remove(&note).unwrap();
        assert!(note.exists(), "nor is it removed");
        drop(lease);
    });
}

#[test]
fn an_address_told_again_is_good_for_longer() {
    in_namespace(async |network| {
        let lease = network.take("02:00:00:00:00:09", None).await.unwrap();
        let (_, netns) = lease.nic();
        let netns = std::fs::File::open(netns.unwrap()).unwrap();
        let addresses = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        for minutes in [10, 30] {
            let slot = lease.shared();
            slot.allow_names(&addresses, Duration::from_secs(minutes * 60)).unwrap();
            let list = |set: &str| {
                let args = ["list", "set", "inet", "rethaw", set];
                let done = std::process::Command::new("nft").args(args).output()?;
                Ok(String::from_utf8_lossy(&done.stdout).into_owned())
            };
            for (set, address) in [("names4", "192.0.2.1"), ("names6", "2001:db8::1")] {
                let said = tap::inside(&netns, || list(set)).unwrap();
                let shown = format!("{address} timeout {minutes}m");
                assert!(said.contains(&shown), "{shown}: {said}");
            }
        }
    });
}

#[test]
fn rules_are_what_nft_says_they_are() {
    in_namespace(async |network| {
        let lease = network.take("02:00:00:00:00:09", None).await.unwrap();
        let (a, allow) =
            (lease.addresses().clone(), r#"{"allow":["192.0.2.0/25","192.0.2.128/25"]}"#);
        let policy = Policy {
            internet: serde_json::from_str(allow).unwrap(),
            limits: Limits { bytes_per_second: Some(1 << 20), packets_per_second: Some(1000) },
            ..Policy::default()
        };
        lease.rules().set_policy(&policy).await.unwrap();
        let (_, netns) = lease.nic();
        let netns = std::fs::File::open(netns.unwrap()).unwrap();
        let shown = tap::inside(&netns, || {
            std::process::Command::new("nft").arg("list").arg("ruleset").output()
        });
        let shown = String::from_utf8(shown.unwrap().stdout).unwrap();
        for rule in [
            "@ll,48,48 != 0x20000000009 counter name \"spoofed\" drop".to_owned(),
            format!("ip saddr != {} counter name \"spoofed\" drop", a.ipv4),
            "iifname \"tap0\" ip daddr @never4 counter name \"reserved\" reject".to_owned(),
            "ip daddr @networks4 counter name \"sent\" accept".to_owned(),
            "iifname \"tap0\" limit rate over 1000/second burst 100 packets counter name \"limited\" drop"
                .to_owned(),
            "limit rate over 1 mbytes/second".to_owned(),
            "elements = { 192.0.2.0/24 }".to_owned(),
            "169.254.0.0/16".to_owned(),
            "iifname \"tap0\" udp dport 53 accept".to_owned(),
            "ct direction reply ct state established,related".to_owned(),
        ] {
            assert!(shown.contains(&rule), "{rule}\nis not in\n{shown}");
        }
        let host = std::process::Command::new("nft").args(["list", "ruleset"]).output().unwrap();
        let host = String::from_utf8(host.stdout).unwrap();
        for rule in ["masquerade", "counter name \"between\" drop", "counter name \"host\" drop"] {
            assert!(host.contains(rule), "{rule}\nis not in\n{host}");
        }
    });
}
