//! Another tap than the snapshot's, and rate limits set again.

use std::path::Path;
use std::process::Command;

use snapshotter::firecracker::api::{RateLimiter, TokenBucket};
use snapshotter::vmm::{MemoryBackend, Nic};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::rig::{Rig, wait_for_rounds};

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// Removes the namespace and the tap in it.
struct Netns(String);

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

async fn get(socket: &Path, path: &str) -> String {
    let mut stream = tokio::net::UnixStream::connect(socket).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !answer.ends_with(b"}") {
        let n = stream.read(&mut buffer).await.unwrap();
        assert_ne!(n, 0, "{}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&buffer[..n]);
    }
    String::from_utf8(answer).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tap_and_the_limits_are_those_of_the_restore() {
    let bucket = |size| TokenBucket { size, one_time_burst: None, refill_time: 100 };
    let limiter = |size| RateLimiter { bandwidth: Some(bucket(size)), ops: None };
    let golden_rig = Rig::new(true).await;
    let golden = golden_rig.golden().await;
    let rig = Rig::with(|config| {
        config.limits.disk = Some(limiter(1_111_111));
        config.limits.network_tx = Some(limiter(2_222_222));
    })
    .await;
    let mut spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
    let netns = Netns(format!("rethaw-t-{}", std::process::id()));
    ip(&format!("netns add {}", netns.0));
    ip(&format!("netns exec {} ip tuntap add name vm7 mode tap vnet_hdr", netns.0));
    let path = Path::new("/run/netns").join(&netns.0);
    spec.nic = Nic { tap: Some("vm7".to_owned()), netns: Some(path) };
    let vm = rig.restore(&spec).await;
    wait_for_rounds(&spec.run_dir, 2).await;
    let pid = vm.record().process.pid;
    let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(of(&pid.to_string()), of("self"));
    // Firecracker has the tap open: it can have no second user.
    let flags = Command::new("ip")
        .args(["netns", "exec", &netns.0, "ip", "-details", "link", "show", "vm7"])
        .output()
        .unwrap();
    let flags = String::from_utf8_lossy(&flags.stdout).into_owned();
    assert!(flags.contains(&format!("user {}", vm.record().details["uid"])), "{flags}");
    let home = spec.run_dir.join("jail/firecracker").join(&spec.id).join("root");
    let config = get(&home.join("api.sock"), "/vm/config").await;
    assert!(config.contains("\"host_dev_name\":\"vm7\""), "{config}");
    assert!(config.contains("1111111") && config.contains("2222222"), "{config}");
    vm.kill().await;
    rig.assert_gone(&spec.id, &spec.run_dir);

    // A tap that is not there is an error, and nothing stays.
    let mut spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
    spec.nic = Nic { tap: Some("no-such-tap".to_owned()), netns: None };
    let e = snapshotter::vmm::Driver::prepare(&rig.driver, &spec).await.unwrap_err();
    assert!(e.to_string().contains("no-such-tap"), "{e}");
    rig.assert_gone(&spec.id, &spec.run_dir);
}
