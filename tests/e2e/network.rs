//! Sandboxes reach what they may, over networks of their own, and nothing else.

use std::time::Duration;

use serde_json::{Value, json};

use crate::service::{Service, id};
use crate::world::{BIG, ECHO, HTTP, UDP, in_world, shown};

pub const FLAGS: &[&str] = &["--network", "on", "--dns", "198.51.100.2"];
pub const OUTSIDE: &str = "198.51.100.2";

/// Functions for scripts in the guest. A refusal shows at once, a lost packet after two seconds.
const PYTHON: &str = "
import json, socket, sys
def fetch(host, port, path='/'):
    try:
        s = socket.create_connection((host, port), 2)
        s.sendall(f'GET {path} HTTP/1.0\\r\\n\\r\\n'.encode())
        text = b''
        while part := s.recv(65536): text += part
        return text.split(b'\\r\\n\\r\\n', 1)[1].decode()
    except OSError as e:
        return f'no: {e}'
";

/// What a script in the guest, in Python, leaves in `out`.
pub async fn python(service: &Service, id: &str, script: &str) -> Value {
    let script = format!("{PYTHON}\nout = None\n{script}\nprint(json.dumps(out))");
    let done = service.exec(id, &json!({ "argv": ["python3", "-c", script] })).await;
    assert_eq!(done.code(), 0, "{script}: {}", done.0);
    serde_json::from_str(done.stdout().trim()).unwrap()
}

pub async fn network(service: &Service, id: &str) -> Value {
    service.client().get(&format!("/v1/sandboxes/{id}/network")).await.expect(200)
}

pub async fn change(service: &Service, id: &str, policy: &Value) -> Value {
    let path = format!("/v1/sandboxes/{id}/network");
    service.client().json("PATCH", &path, policy).await.expect(200)
}

pub fn refused(answer: &Value) -> bool {
    answer.as_str().is_some_and(|text| text.starts_with("no: "))
}

#[test]
fn a_sandbox_reaches_what_it_may() {
    in_world(async |world| {
        let service = Service::start_with(2, FLAGS).await;
        let one = service.create_with(&json!({})).await;
        assert_eq!(one["origin"], "warm");
        let other = service.create_with(&json!({ "internet": "on" })).await;
        let (a, b) = (id(&one), id(&other));
        for sandbox in [&one, &other] {
            assert_eq!(sandbox["network"]["attached"], true, "{sandbox}");
            assert_eq!(sandbox["network"]["internet"], "on");
        }
        let address = |sandbox: &Value| sandbox["network"]["ipv4"].as_str().unwrap().to_owned();
        assert_ne!(address(&one), address(&other));
        assert_ne!(one["identity"]["mac"], other["identity"]["mac"]);
        let shown_in_guest =
            service.sh(&a, "ip -4 -o address show dev eth0; ip link show eth0").await;
        assert!(shown_in_guest.contains(&address(&one)), "{shown_in_guest}");
        assert!(shown_in_guest.contains(one["identity"]["mac"].as_str().unwrap()));

        // Outside, by address, by IPv6 and by name; never the host, metadata, another sandbox.
        let (to_host, neighbour) = (service.client().url().to_owned(), address(&other));
        let port = to_host.rsplit(':').next().unwrap().to_owned();
        service.sh(&b, "python3 -m http.server 8080 >/dev/null 2>&1 & sleep 1").await;
        let script = format!(
            "out = dict(v4=fetch('{OUTSIDE}', {HTTP}), v6=fetch('fd00:51::2', {HTTP}),
                name=fetch('allowed.test', {HTTP}), meta=fetch('169.254.169.254', {HTTP}),
                host=fetch('198.51.100.1', {port}), neighbour=fetch('{neighbour}', 8080))"
        );
        let out = python(&service, &a, &script).await;
        assert_eq!(out["v4"], "hello 198.51.100.1", "{out}");
        assert_eq!(out["v6"], "hello fd00:51::1", "{out}");
        assert_eq!(out["name"], "hello 198.51.100.1", "{out}");
        for denied in ["meta", "host", "neighbour"] {
            assert!(refused(&out[denied]), "{denied}: {out}");
        }
        let packets = network(&service, &a).await["packets"].clone();
        assert!(packets["sent"].as_u64() > Some(0) && packets["received"].as_u64() > Some(0));
        assert!(packets["reserved"].as_u64() > Some(0), "{packets}");

        // From an address that is not its own, nothing gets out.
        let script = format!(
            "
import struct
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
def send(source, text):
    udp = struct.pack('>HHHH', 9, {UDP}, 8 + len(text), 0) + text
    head = struct.pack('>BBHHHBBH4s4s', 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0,
        socket.inet_aton(source), socket.inet_aton('{OUTSIDE}'))
    s.sendto(head + udp, ('{OUTSIDE}', 0))
send('{neighbour}', b'spoofed')
send('198.51.100.77', b'spoofed')
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.settimeout(20)
u.sendto(b'honest', ('{OUTSIDE}', {UDP}))
out = u.recv(99).decode()"
        );
        assert_eq!(python(&service, &a, &script).await, "honest");
        let heard = world.heard();
        assert!(
            heard.iter().any(|(from, text)| text == "honest" && from.to_string() == "198.51.100.1")
        );
        assert!(heard.iter().all(|(_, text)| text != "spoofed"), "{heard:?}");
        assert!(network(&service, &a).await["packets"]["spoofed"].as_u64() >= Some(2));
        let metrics = service.client().get("/metrics").await.text();
        for outcome in ["spoofed", "reserved", "sent", "host"] {
            let name = format!("rethaw_net_packets_total{{outcome=\"{outcome}\"}} ");
            let count = metrics.lines().find_map(|line| line.strip_prefix(&name));
            assert!(count.is_some_and(|n| n != "0"), "{outcome}: {count:?}");
        }
        service.stop().await;
        nothing_left();
    });
}

/// No link, rule or switch of a service in this namespace.
pub fn nothing_left() {
    let started = std::time::Instant::now();
    // The kernel takes namespaces down a moment after their last process.
    while shown("ip", &["-o", "link"]).contains(": rt") {
        assert!(started.elapsed() < crate::client::DEADLINE, "links stay");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(shown("nft", &["list", "tables"]), "");
    for switch in ["ipv4/conf/h0/forwarding", "ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        let value = std::fs::read_to_string(format!("/proc/sys/net/{switch}")).unwrap();
        assert_eq!(value.trim(), "0", "{switch}");
    }
}

#[test]
fn a_policy_is_changed_while_the_sandbox_runs() {
    in_world(async |_| {
        let service = Service::start_with(1, FLAGS).await;
        let off = service.create_with(&json!({ "internet": "off" })).await;
        let id = id(&off);
        let look = format!(
            "out = dict(v4=fetch('{OUTSIDE}', {HTTP}), three=fetch('198.51.100.3', {HTTP}),
                allowed=fetch('allowed.test', {HTTP}), other=fetch('other.test', {HTTP}))"
        );
        let out = python(&service, &id, &look).await;
        assert!(out.as_object().unwrap().values().all(refused), "{out}");

        // A connection made under one policy does not outlive it.
        change(&service, &id, &json!({ "internet": "on" })).await;
        let hold = format!(
            "
s = socket.create_connection(('{OUTSIDE}', {ECHO}), 20)
s.sendall(b'one')
print(s.recv(9).decode(), flush=True)
s.settimeout(3)
import time
while True:
    time.sleep(0.1)
    try:
        s.sendall(b'.')
        s.recv(9)
    except OSError as e:
        open('/tmp/cut', 'w').write(str(e))
        break
    open('/tmp/alive', 'a').write('.')"
        );
        let held = format!("{PYTHON}\n{hold}");
        let start = json!({ "argv": ["sh", "-c", "exec setsid python3 -c \"$0\" >/tmp/held 2>&1 &", held] });
        assert_eq!(service.exec(&id, &start).await.code(), 0);
        let wait =
            |file: &'static str| format!("while ! test -s {file}; do sleep 0.1; done; cat {file}");
        service.sh(&id, &wait("/tmp/alive")).await;
        change(&service, &id, &json!({ "internet": { "allow": ["allowed.test"] } })).await;
        service.sh(&id, &wait("/tmp/cut")).await;

        let out = python(&service, &id, &look).await;
        // By address before anybody asked for the name; then by name, and so by address.
        assert!(refused(&out["v4"]) && refused(&out["three"]) && refused(&out["other"]), "{out}");
        assert_eq!(out["allowed"], "hello 198.51.100.1", "{out}");
        let script = format!("out = fetch('198.51.100.3', {HTTP})");
        assert_eq!(python(&service, &id, &script).await, "hello 198.51.100.1");
        let list = json!({ "internet": { "allow": ["198.51.100.2/32", "fd00:51::/64"] } });
        let now = change(&service, &id, &list).await;
        assert_eq!(now["internet"], list["internet"].clone());
        let out = python(&service, &id, &look).await;
        assert_eq!(out["v4"], "hello 198.51.100.1", "{out}");
        assert!(refused(&out["three"]) && refused(&out["allowed"]), "{out}");
        assert!(network(&service, &id).await["packets"]["denied"].as_u64() > Some(0));

        // What is too fast does not arrive, until it is slower. Any guest is faster than this.
        let limits =
            json!({ "internet": "on", "network_limits": { "bytes_per_second": 256 << 10 } });
        change(&service, &id, &limits).await;
        let script = format!("out = len(fetch('{OUTSIDE}', {HTTP}, '/big'))");
        assert_eq!(python(&service, &id, &script).await, BIG);
        assert!(network(&service, &id).await["packets"]["limited"].as_u64() > Some(0));

        for (wrong, field) in [
            (json!({ "internet": "maybe" }), "internet"),
            (json!({ "internet": { "allow": ["169.254.169.254"] } }), "internet"),
            (json!({ "network_limits": { "bytes_per_second": 1 } }), "bytes_per_second"),
            (json!({ "public_ports": [0] }), "public_ports"),
        ] {
            let path = format!("/v1/sandboxes/{id}/network");
            let reply = service.client().json("PATCH", &path, &wrong).await;
            let message = reply.refused(422, "invalid_field");
            assert!(message.contains(field), "{wrong}: {message}");
        }
        service.stop().await;
    });
}

#[test]
fn networks_outlive_a_crash_a_pause_and_a_fork() {
    in_world(async |_| {
        let mut service = Service::start_with(1, FLAGS).await;
        let id = id(&service.create_with(&json!({ "internet": { "allow": [OUTSIDE] } })).await);
        let look = format!(
            "out = dict(v4=fetch('{OUTSIDE}', {HTTP}), three=fetch('198.51.100.3', {HTTP}))"
        );
        let open = |file: &str| {
            format!(
                "
import os, time
if os.fork() == 0:
    os.setsid()
    s = socket.create_connection(('{OUTSIDE}', {ECHO}), 20)
    s.settimeout(20)
    while True:
        try:
            s.sendall(b'x'); s.recv(9)
        except OSError as e:
            open('{file}', 'w').write(str(e)); os._exit(0)
        open('{file}.alive', 'w').write(str(time.monotonic()))
        time.sleep(0.1)
while not os.path.exists('{file}.alive'): time.sleep(0.05)"
            )
        };
        python(&service, &id, &open("/tmp/a")).await;
        let connections =
            "out = sum(1 for l in open('/proc/net/tcp') if ' 01 ' in l and ':1F41 ' in l)";
        assert_eq!(python(&service, &id, connections).await, 1);

        service.crash().await;
        service.start_again().await;
        let out = python(&service, &id, &look).await;
        assert_eq!(out["v4"], "hello 198.51.100.1", "{out}");
        assert!(refused(&out["three"]), "the policy outlives the service: {out}");
        assert_eq!(python(&service, &id, connections).await, 1, "and so do connections");

        // A clone has an address of its own and none of the source's connections.
        let source = service.sandbox(&id).await.expect(200);
        let forked = service.act(&id, "fork", &json!({ "count": 1 })).await.expect(201);
        let clone = forked["items"][0].clone();
        let other = crate::service::id(&clone);
        assert_ne!(clone["network"]["ipv4"], source["network"]["ipv4"]);
        assert_eq!(python(&service, &other, connections).await, 0);
        let out = python(&service, &other, &look).await;
        assert_eq!(out["v4"], "hello 198.51.100.1", "{out}");
        assert!(refused(&out["three"]), "{out}");
        let alive = "import time; before = open('/tmp/a.alive').read(); time.sleep(2)
out = open('/tmp/a.alive').read() != before";
        assert_eq!(python(&service, &id, alive).await, true, "the source's connection goes on");

        // Back from a pause it is where it was, and what was open is closed. Its slot was kept; after a
        // crash of the service it is made again.
        for crash in [false, true] {
            service.act(&id, "pause", &json!({})).await.expect(200);
            if crash {
                service.crash().await;
                service.start_again().await;
                // The kernel takes a moment to forget the slot that the killed service held.
                tokio::time::sleep(Duration::from_secs(3)).await;
            }
            let back = service.act(&id, "resume", &json!({})).await.expect(200);
            assert_eq!(back["network"]["ipv4"], source["network"]["ipv4"]);
            let address = back["network"]["ipv4"].as_str().unwrap();
            let now = service.sh(&id, "ip -4 -o address show dev eth0").await;
            assert!(now.contains(address), "{address}: {now}");
            assert_eq!(python(&service, &id, connections).await, 0);
            let out = python(&service, &id, &look).await;
            assert_eq!(out["v4"], "hello 198.51.100.1", "{out}");
            assert!(refused(&out["three"]), "{out}");
        }

        // Killed for good, with its VMs: nothing is left but what the next start removes.
        service.crash().await;
        for process in service.home().processes() {
            process.kill();
        }
        service.start_again().await;
        service.stop().await;
        nothing_left();
    });
}
