//! Programs that run on in clones: the ready hook for Python gives each its own random numbers.

use std::collections::BTreeSet;

use serde_json::json;

use crate::service::{Service, id};

const MODULE: &str = include_str!("../../examples/hooks/python/rethaw_reseed.py");
const HOOK: &str = include_str!("../../examples/hooks/python/50-python-reseed");

/// A warm Python: it has drawn numbers, waits to be asked, and answers with the next ones.
const WARM: &str = r#"
import os, random, ssl, sys, time
name = sys.argv[1]
if name == "hooked":
    sys.path.insert(0, "/opt/rethaw")
    import rethaw_reseed
    rethaw_reseed.install()
random.seed(7), random.random(), ssl.RAND_bytes(16)
open(f"/dev/shm/{name}-warm", "w").close()
while not os.path.exists("/dev/shm/ask"):
    time.sleep(0.01)
with open(f"/dev/shm/{name}-tmp", "w") as file:
    print(ssl.RAND_bytes(16).hex(), random.random(), random.getrandbits(64),
        random.randint(0, 1 << 60), file=file)
os.rename(f"/dev/shm/{name}-tmp", f"/dev/shm/{name}-answer")
"#;

#[tokio::test]
async fn a_warm_python_draws_other_numbers_in_each_clone() {
    let service = Service::start(1).await;
    let source = service.create().await;
    let put = async |path: &str, mode: &str, text: &'static str| {
        let path = format!("/v1/sandboxes/{source}/files?path={path}&mode={mode}");
        let reply = service.client().send("PUT", &path, &[], text).await;
        assert!((200..300).contains(&reply.status), "{}", reply.text());
    };
    put("/opt/rethaw/rethaw_reseed.py", "644", MODULE).await;
    put("/etc/rethaw/restore.d/50-python-reseed", "755", HOOK).await;
    put("/opt/warm.py", "644", WARM).await;
    // Writing it again may change the mode, so it is set where it counts.
    service.sh(&source, "chmod 755 /etc/rethaw/restore.d/50-python-reseed").await;
    for name in ["hooked", "plain"] {
        let start = format!("setsid python3 /opt/warm.py {name} > /dev/shm/{name}-log 2>&1 &");
        service.sh(&source, &start).await;
        let look = format!("test -e /dev/shm/{name}-warm || cat /dev/shm/{name}-log");
        service
            .until("Python is warm", async || {
                service.sh(&source, &look).await.is_empty().then_some(())
            })
            .await;
        let warm = format!("until test -e /dev/shm/{name}-warm; do sleep 0.05; done");
        service.sh(&source, &warm).await;
    }

    let reply = service.act(&source, "fork", &json!({ "count": 3 })).await.expect(201);
    let clones = reply["items"].as_array().unwrap();
    let (mut hooked, mut plain) = (BTreeSet::new(), BTreeSet::new());
    for clone in clones {
        let items = clone["identity"]["items"].as_array().unwrap();
        let hooks = items.iter().find(|i| i["item"] == "hooks").unwrap();
        assert_eq!(hooks["details"]["50-python-reseed"], "exit 0", "{hooks}");
        let id = id(clone);
        service.sh(&id, "touch /dev/shm/ask").await;
        for name in ["hooked", "plain"] {
            let answer = format!(
                "until test -e /dev/shm/{name}-answer; do sleep 0.05; done; \
                 cat /dev/shm/{name}-answer /dev/shm/{name}-log"
            );
            let answer = service.sh(&id, &answer).await;
            let numbers: Vec<&str> = answer.split(' ').collect();
            assert_eq!(numbers.len(), 4, "{answer}");
            for (kind, number) in numbers.iter().enumerate() {
                let new = match name {
                    "hooked" => hooked.insert((kind, (*number).to_owned())),
                    _ => plain.insert((kind, (*number).to_owned())),
                };
                assert!(new || name == "plain", "{name} repeats {kind}: {number}");
            }
        }
    }
    assert_eq!(hooked.len(), 12);
    // What would happen without it: `random` goes on from the state all clones share.
    assert_eq!(plain.iter().filter(|(kind, _)| *kind == 1).count(), 1, "{plain:?}");
    service.stop().await;
}
