//! A tree of templates: warm processes live on in clones, children of children, the same twice.

use serde_json::{Value, json};

use super::{archive, ask, build, delete, log, printed, sandbox, snapshots, template, upload};
use crate::identity::all_differ;
use crate::service::{Service, id};

const MODULE: &str = include_str!("../../../examples/hooks/python/rethaw_reseed.py");
const HOOK: &str = include_str!("../../../examples/hooks/python/50-python-reseed");

/// Answers each connection with what it knows: its pid, a number drawn when it started, one drawn
/// now from the generator the hook looks after, and one from a generator that nobody looks after.
const SERVER: &str = r#"
import json, os, random, socket, sys
sys.path.insert(0, "/opt/rethaw")
import rethaw_reseed
rethaw_reseed.install()
born, plain = os.urandom(8).hex(), random.Random(7)
listener = socket.create_server(("127.0.0.1", 8123))
print("serving", os.environ["GREETING"], os.getcwd(), flush=True)
while True:
    connection, _ = listener.accept()
    answer = {"pid": os.getpid(), "born": born, "hooked": random.random(), "plain": plain.random(),
              "greeting": os.environ["GREETING"]}
    try:
        connection.sendall(json.dumps(answer).encode())
    except OSError:
        pass
    connection.close()
"#;
const CLIENT: &str = r#"
import socket
with socket.create_connection(("127.0.0.1", 8123), 10) as connection:
    print(connection.makefile().read())
"#;

async fn warm_steps(service: &Service) -> Value {
    let files = [
        ("srv/app/server.py", SERVER, 0o644),
        ("srv/app/ask.py", CLIENT, 0o755),
        ("opt/rethaw/rethaw_reseed.py", MODULE, 0o644),
        ("etc/rethaw/restore.d/50-python-reseed", HOOK, 0o755),
    ];
    let sha256 = upload(service, archive(&files)).await;
    json!([
        { "copy": { "dst": "/", "archive_sha256": sha256 } },
        { "env": { "GREETING": "hello" } },
        { "workdir": "/srv/app" },
        { "run": "echo built by $(id -un) in $PWD with $GREETING | tee built" },
        { "start": "exec python3 server.py" },
        { "wait": { "port": 8123 } },
        { "user": "nobody" },
        { "run": { "command": "id -un; echo complaint >&2", "timeout_seconds": 30 } },
        { "check": "python3 ask.py" },
    ])
}

async fn ask_server(service: &Service, id: &str) -> Value {
    serde_json::from_str(&service.sh(id, "python3 /srv/app/ask.py").await).unwrap()
}

#[tokio::test]
async fn a_warm_process_lives_on_in_a_tree_of_templates() {
    let mut service = Service::start(0).await;
    let golden = snapshots(&service);
    let steps = warm_steps(&service).await;
    let warm = build(&service, "warm", "base", &steps).await;
    the_log_tells(&log(&service, "warm").await);
    assert_eq!(warm["lineage"], json!(["base", "warm"]));
    assert_eq!(warm["cached"], false);
    layer_is_small(&service, &warm["snapshot"]).await;

    // Clones: the same process, not the same numbers.
    let (a, b) = (sandbox(&service, "warm").await, sandbox(&service, "warm").await);
    let (a, b) = (id(&a), id(&b));
    all_differ(&service, &[a.clone(), b.clone()]).await;
    let (of_a, of_b) = (ask_server(&service, &a).await, ask_server(&service, &b).await);
    for same in ["pid", "born", "greeting", "plain"] {
        assert_eq!(of_a[same], of_b[same], "{same}: {of_a} {of_b}");
    }
    assert_ne!(of_a["hooked"], of_b["hooked"], "{of_a} {of_b}");
    assert_eq!(
        service.sh(&a, "echo $GREETING; cat /srv/app/built").await,
        "hello\nbuilt by root in /srv/app with hello"
    );
    assert!(!template(&service, "warm").await["last_used_at"].is_null());

    // The same once more is found, under whatever name.
    let again = build(&service, "warm-too", "base", &steps).await;
    assert_eq!(
        (&again["cached"], &again["snapshot"]["id"]),
        (&json!(true), &warm["snapshot"]["id"])
    );
    ask(&service, "warm", "base", &steps).await.expect(202);
    ask(&service, "warm", "base", &json!([])).await.refused(409, "template_exists");

    // A child stands on its parent's layer, and a chain that grows long is made short again.
    let more = json!([{ "run": "echo more >> /srv/app/built; rm /srv/app/none 2>&1 || true" }]);
    let child = build(&service, "child", "warm", &more).await;
    assert_eq!(child["snapshot"]["parent"], warm["snapshot"]["id"]);
    assert_eq!(child["snapshot"]["layers"], 3);
    let mut parent = "child".to_owned();
    for (name, layers) in [("c2", 4), ("c3", 5), ("c4", 2)] {
        let steps = json!([{ "run": format!("echo {name} >> /srv/app/built") }]);
        let made = build(&service, name, &parent, &steps).await;
        assert_eq!(made["snapshot"]["layers"], layers, "{made}");
        parent = name.to_owned();
    }
    let deep = template(&service, "c4").await;
    assert_eq!(deep["lineage"], json!(["base", "warm", "child", "c2", "c3", "c4"]));
    let c = id(&sandbox(&service, "c4").await);
    let lines = service.sh(&c, "tail -n +2 /srv/app/built | tr '\\n' ' '; echo $GREETING").await;
    assert_eq!(lines, "more c2 c3 c4 hello");
    assert_eq!(ask_server(&service, &c).await["born"], of_a["born"]);

    derived_pool(&service).await;
    refused_while_needed(&service, &a).await;

    // All of it over a crash, a paused sandbox of a derived template among it.
    service.act(&b, "pause", &json!({})).await.expect(200);
    service.crash().await;
    service.start_again().await;
    for name in ["warm", "warm-too", "child", "c2", "c3", "c4"] {
        assert_eq!(template(&service, name).await["state"], "ready", "{name}");
    }
    assert_eq!(ask_server(&service, &a).await["born"], of_a["born"]);
    service.act(&b, "resume", &json!({})).await.expect(200);
    assert_eq!(ask_server(&service, &b).await["born"], of_a["born"]);
    let late = id(&sandbox(&service, "child").await);
    assert_eq!(service.sh(&late, "tail -n 1 /srv/app/built").await, "more");

    for sandbox in [&a, &b, &c, &late] {
        service.client().delete(&format!("/v1/sandboxes/{sandbox}")).await.expect(204);
    }
    for name in ["c4", "c3", "c2", "child", "warm"] {
        delete(&service, name).await.expect(204);
        service
            .client()
            .get(&format!("/v1/templates/{name}"))
            .await
            .refused(404, "template_not_found");
    }
    // Its twin has the same snapshot.
    let d = id(&sandbox(&service, "warm-too").await);
    assert_eq!(ask_server(&service, &d).await["born"], of_a["born"]);
    service.client().delete(&format!("/v1/sandboxes/{d}")).await.expect(204);
    delete(&service, "warm-too").await.expect(204);
    assert_eq!(snapshots(&service), golden, "layers that nobody stands on");
    service.stop().await;
}

/// What steps printed, which step did, and how it ended.
fn the_log_tells(log: &[Value]) {
    assert_eq!(printed(log, 4), "built by root in /srv/app with hello\n");
    assert_eq!(printed(log, 5), "serving hello /srv/app\n");
    assert_eq!(printed(log, 8), "nobody\n");
    assert!(printed(log, 9).contains("\"born\""), "{log:?}");
    let complaint = |l: &&Value| l["kind"] == "stderr" && l["text"] == "complaint\n";
    assert!(log.iter().any(|l| complaint(&l)), "{log:?}");
    let steps: Vec<_> = log.iter().filter(|l| l["kind"] == "step").collect();
    assert_eq!(steps.len(), 9, "{steps:?}");
    assert_eq!(steps[3]["text"], "run echo built by $(id -un) in $PWD with $GREETING | tee built");
    let last = log.last().unwrap();
    assert_eq!((&last["kind"], &last["text"]), (&json!("end"), &json!("ready")));
}

/// What is stored is what changed, and not the machine once more.
async fn layer_is_small(service: &Service, snapshot: &Value) {
    let base = template(service, "base").await["snapshot"].clone();
    let bytes = |of: &Value, what: &str| of[what].as_u64().unwrap();
    let (layer, all) = (bytes(snapshot, "memory_layer_bytes"), bytes(&base, "memory_layer_bytes"));
    assert!(layer > 0 && layer < all / 2, "{layer} of {all}");
    let disk = bytes(snapshot, "disk_layer_bytes");
    assert!(disk > 0 && disk < 4 << 20, "{disk} bytes of disk for four small files");
    assert!(bytes(snapshot, "allocated_bytes") >= layer + disk);
    assert_eq!(snapshot["memory_bytes"], base["memory_bytes"]);
}

/// A derived template has a pool of its own once somebody wants one.
async fn derived_pool(service: &Service) {
    let path = "/v1/pools/child";
    assert_eq!(service.client().get(path).await.expect(200)["target"], 0);
    service.client().json("PUT", path, &json!({ "target": 1 })).await.expect(200);
    let full = async || {
        let pool = service.client().get(path).await.expect(200);
        (pool["ready"] == 1 && pool["restoring"] == 0).then_some(())
    };
    service.until("the child's pool is full", full).await;
    let claimed = sandbox(service, "child").await;
    assert_eq!(claimed["origin"], "warm");
    let claimed = id(&claimed);
    assert_eq!(service.sh(&claimed, "echo $GREETING").await, "hello");
    ask_server(service, &claimed).await;
    service.client().delete(&format!("/v1/sandboxes/{claimed}")).await.expect(204);
    service.client().json("PUT", path, &json!({ "target": 0 })).await.expect(200);
}

async fn refused_while_needed(service: &Service, sandbox: &str) {
    let said = delete(service, "warm").await.refused(409, "template_in_use");
    assert!(said.contains(sandbox) && said.contains("template child"), "{said}");
    let said = delete(service, "c3").await.refused(409, "template_in_use");
    assert!(said.contains("template c4"), "{said}");
    delete(service, "base").await.refused(409, "template_in_use");
    delete(service, "nobody").await.refused(404, "template_not_found");
}
