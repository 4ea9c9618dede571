//! The session's promise: whatever one host left on the stream, the next one gets a clean
//! connection, and data of any shape goes through unchanged.
#![cfg(feature = "client")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{SOON, run};
use guest_agent::agent::{Agent, Config};
use guest_agent::client::AgentClient;
use guest_agent::session::codec::{Decoder, Encode, Encoder, Nonce};
use guest_agent::session::{Session, SessionIo};
use guest_agent::transport::serve_session;
use guest_agent::wire::ExecRequest;
use proptest::collection::vec;
use proptest::prelude::*;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::UnixStream;

fn encode(encoder: &mut Encoder, mut data: &[u8], out: &mut Vec<u8>) {
    while !data.is_empty() {
        match encoder.next(data) {
            Encode::Stuff => {
                out.extend(Encoder::STUFFING);
                encoder.restart();
            }
            Encode::Plain(n) => {
                out.extend(&data[..n]);
                encoder.wrote(&data[..n]);
                data = &data[n..];
            }
        }
    }
}

/// Data, and the markers in it, as a reader sees them.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Data(Vec<u8>),
    Marker(Nonce),
}

fn decode(wire: &[u8], cuts: &[usize], room: usize) -> Vec<Seen> {
    let (mut decoder, mut seen) = (Decoder::default(), Vec::new());
    let (mut at, mut cuts) = (0, cuts.iter().copied().cycle());
    let mut out = vec![0; room];
    while at < wire.len() {
        let chunk = &wire[at..wire.len().min(at + cuts.next().unwrap_or(1).max(1))];
        let mut taken = 0;
        while taken < chunk.len() {
            let step = decoder.decode(&chunk[taken..], &mut out);
            assert!(step.consumed > 0 || step.produced > 0, "no progress");
            taken += step.consumed;
            if step.produced > 0 {
                let piece = &out[..step.produced];
                match seen.last_mut() {
                    Some(Seen::Data(data)) => data.extend(piece),
                    _ => seen.push(Seen::Data(piece.to_vec())),
                }
            }
            if let Some(nonce) = step.marker {
                seen.push(Seen::Marker(nonce));
            }
        }
        at += chunk.len();
    }
    seen
}

/// Bytes among which long runs of 0xFF are common, and the codec's own bytes too.
fn data() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        (1usize..70).prop_map(|n| vec![0xff; n]),
        vec(any::<u8>(), 0..20),
        vec(prop_oneof![Just(0xffu8), Just(0), Just(1)], 0..40),
    ];
    vec(piece, 0..20).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn data_survives_any_chunking(
        data in data(),
        writes in vec(1usize..50, 1..8),
        cuts in vec(1usize..40, 1..8),
        room in 1usize..64,
    ) {
        let mut encoder = Encoder::default();
        let nonce = Nonce::from_random([9; 16]);
        let mut wire = nonce.marker().to_vec();
        let (mut at, mut sizes) = (0, writes.iter().cycle());
        while at < data.len() {
            let n = (*sizes.next().unwrap()).min(data.len() - at);
            encode(&mut encoder, &data[at..at + n], &mut wire);
            at += n;
        }
        let body = &wire[33..];
        prop_assert!(!body.windows(16).any(|w| w.iter().all(|b| *b == 0xff)), "imitates a marker");
        let mut wanted = vec![Seen::Marker(nonce)];
        if !data.is_empty() {
            wanted.push(Seen::Data(data));
        }
        prop_assert_eq!(decode(&wire, &cuts, room), wanted);
    }

    #[test]
    fn a_marker_is_found_after_anything(
        before in data(),
        cut in any::<proptest::sample::Index>(),
        random in any::<[u8; 16]>(),
        garbage in vec(any::<u8>(), 0..40),
        after in data(),
        cuts in vec(1usize..40, 1..8),
    ) {
        // An old session, torn at any byte (also inside its own marker), then rubbish.
        let mut wire = Nonce::from_random([3; 16]).marker().to_vec();
        encode(&mut Encoder::default(), &before, &mut wire);
        wire.truncate(cut.index(wire.len() + 1));
        wire.extend(garbage);
        let nonce = Nonce::from_random(random);
        wire.extend(nonce.marker());
        encode(&mut Encoder::default(), &after, &mut wire);
        let seen = decode(&wire, &cuts, 50);
        let at = seen.iter().rposition(|s| *s == Seen::Marker(nonce));
        prop_assert!(at.is_some(), "marker lost: {:?}", seen);
        let rest = &seen[at.unwrap() + 1..];
        if after.is_empty() {
            prop_assert!(rest.is_empty());
        } else {
            prop_assert_eq!(rest, &[Seen::Data(after)][..]);
        }
    }
}

fn nonce() -> std::io::Result<[u8; 16]> {
    Ok([42; 16])
}

async fn pair() -> (SessionIo<DuplexStream>, SessionIo<DuplexStream>) {
    let (host, guest) = duplex(100);
    let (host, guest) = (Session::new(host), Session::new(guest));
    let (host, guest) = tokio::join!(host.connect(nonce), guest.accept());
    (host.unwrap(), guest.unwrap().unwrap())
}

#[test]
fn a_session_is_a_duplex_stream_without_delay() {
    run(async {
        let (mut host, mut guest) = pair().await;
        // Data that ends in 0xFF must arrive though nothing follows it.
        for n in 1..40 {
            let text = vec![0xff; n];
            host.write_all(&text).await.unwrap();
            let mut got = vec![0; n];
            guest.read_exact(&mut got).await.unwrap();
            assert_eq!(got, text);
            guest.write_all(&got).await.unwrap();
            host.read_exact(&mut got).await.unwrap();
            assert_eq!(got, text);
        }
    });
}

#[test]
fn a_new_marker_ends_the_connection_it_follows() {
    run(async {
        let (mut raw, guest) = duplex(4096);
        let guest = Session::new(guest);
        raw.write_all(&Nonce::from_random([1; 16]).marker()).await.unwrap();
        let mut first = guest.accept().await.unwrap().unwrap();
        raw.write_all(b"half a requ").await.unwrap();
        let second = Nonce::from_random([2; 16]);
        raw.write_all(&second.marker()).await.unwrap();
        raw.write_all(b"fresh").await.unwrap();
        let mut got = Vec::new();
        let error = first.read_to_end(&mut got).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(b"half a requ".starts_with(&got[..]));
        assert!(first.write_all(b"x").await.is_err(), "an ended connection writes nothing");
        let mut second = guest.accept().await.unwrap().unwrap();
        let mut got = [0; 5];
        second.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"fresh");
        assert!(first.read(&mut [0; 1]).await.is_err(), "nor takes the next one's data");
    });
}

#[test]
fn a_host_ignores_what_was_written_before_its_marker() {
    run(async {
        let (host, mut raw) = duplex(4096);
        let host = Session::new(host);
        let mut stale = vec![0xff; 9];
        stale.extend(b"stale HTTP/2 frames");
        stale.extend(Nonce::from_random([7; 16]).marker());
        stale.extend(b"\0\0\x12more stale");
        // An agent that has just started says so; the host answers with another marker.
        stale.extend(Nonce::HELLO.marker());
        raw.write_all(&stale).await.unwrap();
        let mut count = 0u8;
        let connect = host.connect(|| {
            count += 1;
            Ok([count; 16])
        });
        let guest = async {
            let mut markers = [0; 66];
            raw.read_exact(&mut markers).await.unwrap();
            assert_eq!(markers[..33], Nonce::from_random([1; 16]).marker());
            assert_eq!(markers[33..], Nonce::from_random([2; 16]).marker());
            // The answer to the first marker is stale by now.
            raw.write_all(&markers[..33]).await.unwrap();
            raw.write_all(b"stale again").await.unwrap();
            raw.write_all(&markers[33..]).await.unwrap();
            raw.write_all(b"hello").await.unwrap();
        };
        let (connection, ()) = tokio::join!(connect, guest);
        let mut got = [0; 5];
        connection.unwrap().read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"hello");
    });
}

/// One agent, one stream, many hosts: what a restore looks like to the agent. Between agent and
/// hosts sits a relay that, like QEMU's chardev, keeps the agent's side open for ever.
#[test]
fn hosts_come_and_go_in_the_middle_of_anything() {
    run(async {
        let (mut port, guest) = UnixStream::pair().unwrap();
        let agent =
            Rc::new(Agent::new(Config { root: "/".into(), cgroup: None, log: "/dev/null".into() }));
        tokio::task::spawn_local(serve_session(guest, agent, false));
        for round in 0..30u64 {
            let (host, mut relay) = UnixStream::pair().unwrap();
            let client = AgentClient::connect_session(host, SOON);
            // The relay ends at an arbitrary moment, wherever the bytes are then.
            let hold = Duration::from_micros(200 + round * 700);
            let work = async {
                let client = client.await?;
                let argv = ["sh", "-c", "yes | head -c 1000000"].map(str::to_owned).to_vec();
                let request = ExecRequest { argv, ..Default::default() };
                let mut stream = client.exec(&request, SOON).await?;
                while stream.next_frame().await?.is_some() {}
                Ok::<_, guest_agent::client::AgentError>(())
            };
            let relay = tokio::io::copy_bidirectional(&mut port, &mut relay);
            tokio::select! {
                _ = relay => {}
                _ = work => {}
                () = tokio::time::sleep(hold) => {}
            }
        }
        // The last one stays, and finds an agent as if nothing had been.
        let (host, mut relay) = UnixStream::pair().unwrap();
        tokio::task::spawn_local(async move {
            let _ = tokio::io::copy_bidirectional(&mut port, &mut relay).await;
        });
        let client = AgentClient::connect_session(host, SOON).await.unwrap();
        let health = client.health(SOON).await.unwrap();
        assert_eq!(health.generation, None);
        // The commands of the hosts that left are being killed.
        let mut left = health.processes;
        for _ in 0..100 {
            if left == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            left = client.health(SOON).await.unwrap().processes;
        }
        assert_eq!(left, 0);
    });
}

#[test]
fn a_lost_connection_is_noticed() {
    run(async {
        let (host, guest) = UnixStream::pair().unwrap();
        let agent =
            Rc::new(Agent::new(Config { root: "/".into(), cgroup: None, log: "/dev/null".into() }));
        let serving = tokio::task::spawn_local(serve_session(guest, agent, false));
        let client = AgentClient::connect_session(host, SOON).await.unwrap();
        assert!(!client.is_closed());
        serving.abort();
        client.closed().await;
        assert!(client.is_closed());
        let error = client.health(SOON).await.unwrap_err();
        assert!(matches!(error, guest_agent::client::AgentError::Disconnected(_)), "{error:?}");
    });
}
