//! No two machines of one template are the same machine, from the first look on.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::service::{Service, id};

/// Everything a clone must not share, read by one process in the guest.
const LOOK: &str = r#"
import json, os, random, socket, time, uuid
read = lambda path: open(path).read().strip()
print(json.dumps({
    "kernel_uuid": read("/proc/sys/kernel/random/uuid"),
    "getrandom": os.getrandom(32).hex(),
    "urandom": open("/dev/urandom", "rb").read(32).hex(),
    "userspace_uuid": str(uuid.uuid4()),
    "userspace_random": str(random.random()),
    "boot_id": read("/proc/sys/kernel/random/boot_id"),
    "machine_id": read("/etc/machine-id"),
    "mac": read("/sys/class/net/eth0/address"),
    "hostname": socket.gethostname(),
    "time": time.time(),
}))
"#;
/// What every machine has of its own.
pub const ITEMS: &[&str] = &["hostname", "machine_id", "boot_id", "network"];

/// What the guest says about itself.
pub async fn look(service: &Service, id: &str) -> Value {
    let done = service.exec(id, &json!({ "argv": ["python3", "-c", LOOK] })).await;
    assert_eq!(done.code(), 0, "{}", done.0);
    serde_json::from_str(done.stdout()).unwrap()
}

/// Looks into all of them; no two may agree in anything but the time.
pub async fn all_differ(service: &Service, ids: &[String]) -> Vec<Value> {
    let mut looks = Vec::new();
    let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for id in ids {
        let look = look(service, id).await;
        for (name, value) in look.as_object().unwrap().iter().filter(|(name, _)| *name != "time") {
            let new = seen.entry(name.clone()).or_default().insert(value.to_string());
            assert!(new, "{name} is there twice: {value}");
        }
        looks.push(look);
    }
    looks
}

/// The API's object says what the guest says, and every item was read back.
pub fn object_agrees(sandbox: &Value, look: &Value) {
    let identity = &sandbox["identity"];
    for name in ["hostname", "machine_id", "mac", "boot_id"] {
        assert_eq!(identity[name], look[name], "{name}");
    }
    let items = identity["items"].as_array().unwrap();
    for item in items {
        let done = item["verified"] == true || item["skipped"].is_string();
        assert!(done, "not proven: {item}");
    }
    for name in ITEMS.iter().chain(&["entropy", "clock", "random_seed", "generation", "thaw"]) {
        let item = items.iter().find(|i| i["item"] == *name);
        assert!(item.is_some_and(|i| i["verified"] == true), "{name}: {identity}");
    }
    for name in ITEMS {
        let item = items.iter().find(|i| i["item"] == *name).unwrap();
        assert_ne!(item["old_digest"], item["new_digest"], "{item}");
    }
}

/// The guest's clock is right, as far as the time between two looks at the host's can tell.
pub async fn clock_is_right(service: &Service, id: &str) {
    let now = || std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let before = now();
    let guest = look(service, id).await["time"].as_f64().unwrap();
    let after = now();
    let error = format!("guest {guest}, host {before} to {after}");
    assert!(before - 0.5 < guest && guest < after + 0.5, "{error}");
}

#[tokio::test]
async fn twenty_sandboxes_of_one_template_are_twenty_machines() {
    let service = Service::start(3).await;
    let mut made = Vec::new();
    for _ in 0..20 {
        made.push(service.create_with(&json!({})).await);
    }
    let origins: BTreeSet<_> = made.iter().map(|s| s["origin"].as_str().unwrap()).collect();
    let ids: Vec<_> = made.iter().map(id).collect();
    let looks = all_differ(&service, &ids).await;
    for (sandbox, look) in made.iter().zip(&looks) {
        object_agrees(sandbox, look);
    }
    assert!(origins.contains("warm"), "{origins:?}");
    let generations: BTreeSet<_> =
        made.iter().map(|s| s["identity"]["generation"].as_str().unwrap()).collect();
    let tokens: BTreeSet<_> = made.iter().map(|s| s["access_token"].as_str().unwrap()).collect();
    assert_eq!((generations.len(), tokens.len()), (20, 20));
    clock_is_right(&service, &ids[0]).await;
    service.stop().await;
}
