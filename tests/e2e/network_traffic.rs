//! Less common traffic, and what the operator says about it: names over TCP, too many packets,
//! networks that are denied to all.

use std::time::Instant;

use serde_json::json;

use crate::network::{FLAGS, OUTSIDE, change, network, python, refused};
use crate::service::{Service, id};
use crate::world::{HTTP, UDP, in_world};

/// Asks the guest's name server over TCP: the answer's code, and the addresses in it.
const ASK_TCP: &str = "
import struct
server = next(l.split()[1] for l in open('/etc/resolv.conf') if l.startswith('nameserver'))
def exactly(s, n):
    data = b''
    while len(data) < n:
        part = s.recv(n - len(data))
        if not part: raise OSError('cut short')
        data += part
    return data
def ask(s, name):
    labels = b''.join(bytes([len(l)]) + l.encode() for l in name.split('.'))
    query = struct.pack('>6H', 7, 0x100, 1, 0, 0, 0) + labels + b'\\0' + struct.pack('>2H', 1, 1)
    s.sendall(struct.pack('>H', len(query)) + query)
    reply = exactly(s, struct.unpack('>H', exactly(s, 2))[0])
    answers = struct.unpack('>H', reply[6:8])[0]
    return [reply[3] & 15, [socket.inet_ntoa(reply[-4:])] if answers else []]
";

#[test]
fn names_are_resolved_over_tcp_too() {
    in_world(async |world| {
        let service = Service::start_with(1, FLAGS).await;
        let policy = json!({ "internet": { "allow": ["long.test", "allowed.test"] } });
        let id = id(&service.create_with(&policy).await);

        // An answer that UDP has no room for: the guest's own resolver asks again over TCP, and the
        // way is open to what it is told there.
        let before = format!("out = fetch('198.51.100.3', {HTTP})");
        assert!(refused(&python(&service, &id, &before).await), "nobody asked for the name yet");
        let look = format!("out = [fetch('long.test', {HTTP}), fetch('198.51.100.3', {HTTP})]");
        let hello = "hello 198.51.100.1";
        assert_eq!(python(&service, &id, &look).await, json!([hello, hello]));
        assert!(world.asked_over_tcp("long.test") > 0);

        // Several questions over one connection; what is not allowed is not passed on.
        let several = format!(
            "{ASK_TCP}
with socket.create_connection((server, 53), 20) as s:
    out = [ask(s, 'allowed.test'), ask(s, 'other.test'), ask(s, 'long.test')]"
        );
        let answers = python(&service, &id, &several).await;
        assert_eq!(answers, json!([[0, ["198.51.100.3"]], [5, []], [0, ["198.51.100.3"]]]));
        assert_eq!(world.asked_over_tcp("other.test"), 0);

        change(&service, &id, &json!({ "internet": "on" })).await;
        let one = format!(
            "{ASK_TCP}
with socket.create_connection((server, 53), 20) as s: out = ask(s, 'other.test')"
        );
        assert_eq!(python(&service, &id, &one).await, json!([0, [OUTSIDE]]));
        assert_eq!(world.asked_over_tcp("other.test"), 1);
        service.stop().await;
    });
}

/// Sends that many datagrams as fast as the guest can; gives what was counted meanwhile, and how many
/// seconds it took.
async fn flood(service: &Service, id: &str, datagrams: u64) -> (u64, u64, f64) {
    let count = async || {
        let packets = network(service, id).await["packets"].clone();
        let of = |name: &str| packets[name].as_u64().unwrap();
        (of("sent"), of("limited"))
    };
    let (started, before) = (Instant::now(), count().await);
    let script = format!(
        "
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for n in range({datagrams}): u.sendto(b'flood', ('{OUTSIDE}', {UDP}))
out = n + 1"
    );
    assert_eq!(python(service, id, &script).await, datagrams);
    let after = count().await;
    (after.0 - before.0, after.1 - before.1, started.elapsed().as_secs_f64())
}

#[test]
fn a_flood_is_cut_to_the_packet_rate() {
    in_world(async |world| {
        const DATAGRAMS: u64 = 3000;
        const RATE: u64 = 20;
        // The least that slow limits let through at once.
        const BURST: u64 = 64;
        let service = Service::start_with(1, FLAGS).await;
        let id = id(&service.create_with(&json!({})).await);
        // A full queue on the way may cost some.
        let (sent, limited, _) = flood(&service, &id, DATAGRAMS).await;
        assert!(sent >= DATAGRAMS / 2, "{sent} packets got out without a limit");
        assert_eq!(limited, 0);

        let limits = json!({ "network_limits": { "packets_per_second": RATE } });
        change(&service, &id, &limits).await;
        let heard = world.heard().len();
        let (sent, limited, seconds) = flood(&service, &id, DATAGRAMS).await;
        // All else of what the guest sent was dropped and counted.
        let most = RATE * seconds.ceil() as u64 + BURST;
        assert!(sent > 0 && sent <= most, "{sent} packets got out in {seconds} s");
        assert!(limited >= DATAGRAMS / 2, "{limited} packets were dropped");
        let heard = (world.heard().len() - heard) as u64;
        assert!(heard <= most, "{heard} packets arrived in {seconds} s");

        change(&service, &id, &json!({ "network_limits": {} })).await;
        let (sent, limited, _) = flood(&service, &id, DATAGRAMS).await;
        assert!(sent >= DATAGRAMS / 2, "{sent} packets got out after the limit was lifted");
        assert_eq!(limited, 0);
        service.stop().await;
    });
}

#[test]
fn what_the_operator_denies_no_policy_allows() {
    in_world(async |_| {
        let denied = ["--deny-egress", "198.51.100.3/32", "--deny-egress", "fd00:51::/64"];
        let flags = [FLAGS, &denied].concat();
        let service = Service::start_with(1, &flags).await;
        let id = id(&service.create_with(&json!({ "internet": "on" })).await);
        let look = format!(
            "out = dict(v4=fetch('{OUTSIDE}', {HTTP}), three=fetch('198.51.100.3', {HTTP}),
                name=fetch('allowed.test', {HTTP}), v6=fetch('fd00:51::2', {HTTP}))"
        );
        let all = json!(["198.51.100.0/24", "allowed.test", "fd00:51::2"]);
        for internet in [json!("on"), json!({ "allow": all })] {
            let before = network(&service, &id).await["packets"]["reserved"].as_u64().unwrap();
            change(&service, &id, &json!({ "internet": internet })).await;
            let out = python(&service, &id, &look).await;
            assert_eq!(out["v4"], "hello 198.51.100.1", "{out}");
            for denied in ["three", "name", "v6"] {
                assert!(refused(&out[denied]), "{denied} under {internet}: {out}");
            }
            let counted = network(&service, &id).await["packets"]["reserved"].as_u64().unwrap();
            assert!(counted >= before + 3, "{before} to {counted}");
        }
        service.stop().await;
    });
}
