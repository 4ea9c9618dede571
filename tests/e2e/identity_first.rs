//! The first instruction: a program that draws random numbers and looks at the clock without a
//! pause, across a fork, never draws in a clone what another clone draws, and never runs in a clone
//! that is not itself yet.

use std::collections::BTreeSet;

use serde_json::json;

use crate::service::{Service, id};

/// One line a sample: kind, generation before, value, generation after. The generation is read
/// through a mapping, so nothing lies between it and the sample. Ends by itself.
const SAMPLER: &str = r#"
import mmap, os, time
with open("/run/rethaw/generation", "rb") as file:
    now = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
generation = lambda: now[:36].decode()
uuid = os.open("/proc/sys/kernel/random/uuid", os.O_RDONLY)
samples = {
    "getrandom": lambda: os.getrandom(16).hex(),
    "uuid": lambda: os.pread(uuid, 36, 0).decode(),
    "clock": lambda: str(time.time_ns()),
}
out = open("/dev/shm/samples", "w", buffering=1)
first, after = generation(), 0
end = time.monotonic() + 120
while after < 900 and time.monotonic() < end and out.tell() < 8 << 20:
    for kind, draw in samples.items():
        before = generation()
        value = draw()
        print(kind, before, value, generation(), file=out)
        after += os.path.exists("/dev/shm/forked") or before != first
open("/dev/shm/done", "w").close()
"#;

/// A line of the sampler.
type Sample = (String, String, String, String);

fn samples(text: &str) -> Vec<Sample> {
    let sample = |line: &str| {
        let mut words = line.split(' ').map(str::to_owned);
        let mut next = || words.next().unwrap_or_else(|| panic!("broken line {line:?}"));
        (next(), next(), next(), next())
    };
    text.lines().map(sample).collect()
}

#[tokio::test]
async fn nothing_runs_between_the_restore_and_the_identity() {
    let service = Service::start(1).await;
    let source = service.create_with(&json!({})).await;
    let past = source["identity"]["generation"].as_str().unwrap().to_owned();
    let source = id(&source);
    let path = format!("/v1/sandboxes/{source}/files?path=/opt/sampler.py");
    let reply = service.client().send("PUT", &path, &[], SAMPLER).await;
    assert!((200..300).contains(&reply.status), "{}", reply.text());
    service.sh(&source, "setsid python3 /opt/sampler.py > /dev/shm/log 2>&1 &").await;
    service.sh(&source, "until test -s /dev/shm/samples; do sleep 0.05; done").await;

    let asked = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
    let reply = service.act(&source, "fork", &json!({ "count": 3 })).await.expect(201);
    service.sh(&source, "touch /dev/shm/forked").await;
    let clones = reply["items"].as_array().unwrap();
    let read = async |id: &str| {
        service
            .until("the sampler is done", async || {
                let look = "test ! -e /dev/shm/done || echo done; cat /dev/shm/log";
                let text = service.sh(id, look).await;
                assert!(text.is_empty() || text == "done", "{text}");
                (text == "done").then_some(())
            })
            .await;
        let path = format!("/v1/sandboxes/{id}/files?path=/dev/shm/samples");
        let reply = service.client().get(&path).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        samples(&reply.text())
    };

    let mut drawn = BTreeSet::new();
    let mut shared: Option<Vec<Sample>> = None;
    for clone in clones {
        let generation = clone["identity"]["generation"].as_str().unwrap();
        let all = read(&id(clone)).await;
        let old = all.iter().take_while(|s| s.1 == past && s.3 == past).count();
        // What is from before the freeze is the same in all. A clone that had run for one sample
        // before its identity would have one more, or another one.
        match &shared {
            None => shared = Some(all[..old].to_vec()),
            Some(shared) => assert_eq!(shared[..], all[..old], "a clone ran too early"),
        }
        // One sample may have been under way.
        let under_way = usize::from(all[old].1 == past);
        let new = &all[old + under_way..];
        assert!(new.len() >= 800, "{} samples after the thaw", new.len());
        let mut before = asked;
        for (kind, from, value, to) in new {
            assert_eq!((&**from, &**to), (generation, generation), "{kind} {value}");
            if kind == "clock" {
                let now: u128 = value.parse().unwrap();
                assert!(now >= before, "the clock goes back: {before} to {now}");
                before = now;
            } else {
                assert!(drawn.insert(value.clone()), "{kind} {value} was drawn twice");
            }
        }
    }
    // The source went on as well, from the same state, and draws nothing that a clone draws.
    let shared = shared.unwrap();
    let own = read(&source).await;
    assert!(own.len() > shared.len(), "the source stands still");
    // One was under way here, too.
    for (kind, _, value, _) in own[shared.len() + 1..].iter().filter(|s| s.0 != "clock") {
        assert!(drawn.insert(value.clone()), "{kind} {value} was drawn twice");
    }
    service.stop().await;
}
