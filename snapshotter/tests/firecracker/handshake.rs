//! The bytes Firecracker really sends, as the page server's documentation has them.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use snapshotter::firecracker::api::{
    ApiClient, ApiError, MemoryBackendType, NetworkOverride, SnapshotLoad,
};
use snapshotter::firecracker::version::Version;
use snapshotter::manifest;

use crate::rig::{PATIENCE, Rig, SIZE, binaries};

/// One message: bytes and descriptors.
fn receive(stream: &UnixStream) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut bytes = vec![0_u8; 64 << 10];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 8]);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), flags).unwrap();
    assert!(!message.flags.contains(MsgFlags::MSG_CTRUNC));
    let mut fds = Vec::new();
    for part in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just made these descriptors for this process.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let length = message.bytes;
    bytes.truncate(length);
    (bytes, fds)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_handshake_is_as_documented() {
    let rig = Rig::new(false).await;
    let golden = rig.golden().await;
    // Without the driver: what Firecracker does by itself is in question here.
    let home = rig.dir.path().join("by-hand");
    std::fs::create_dir(&home).unwrap();
    std::fs::copy(golden.dir.join(manifest::VMSTATE), home.join("vmstate")).unwrap();
    for disk in ["root.img", "scratch.img"] {
        std::fs::write(home.join(disk), vec![0_u8; 1 << 20]).unwrap();
    }
    let listener = UnixListener::bind(home.join("uffd.sock")).unwrap();
    let mut child = Command::new(binaries().firecracker)
        .args(["--api-sock", "api.sock"])
        .current_dir(&home)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let api = ApiClient::new(home.join("api.sock"), Version::new(1, 12, 1));
    let started = std::time::Instant::now();
    while api.instance(PATIENCE).await.is_err() {
        assert!(started.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let mut load = SnapshotLoad::new("vmstate", MemoryBackendType::Uffd("uffd.sock".to_owned()));
    // A tap of its own, that Firecracker makes and that goes with it.
    load.network_overrides = vec![NetworkOverride {
        iface_id: "eth0".to_owned(),
        host_dev_name: format!("rt{}", std::process::id()),
    }];
    let put = tokio::spawn(async move { api.load_snapshot(&load, Duration::from_secs(3)).await });
    let (stream, _) =
        tokio::task::spawn_blocking(move || listener.accept()).await.unwrap().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (bytes, fds) = receive(&stream);

    assert_eq!((bytes.first(), bytes.last()), (Some(&b'['), Some(&b']')), "no length, no newline");
    let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    println!("{json}");
    let regions = json.as_array().unwrap();
    assert_eq!(regions.len(), 1, "one region below 3 GiB");
    let region = regions[0].as_object().unwrap();
    let mut keys: Vec<&str> = region.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["base_host_virt_addr", "offset", "page_size", "page_size_kib", "size"]);
    assert_eq!(region["offset"], 0);
    assert_eq!(region["size"], SIZE.memory_bytes);
    assert_eq!(region["page_size"], 4096);
    assert_eq!(region["page_size_kib"], 4096, "in bytes, whatever its name says");
    assert_eq!(region["base_host_virt_addr"].as_u64().unwrap() % 4096, 0);
    assert_eq!(fds.len(), 1);
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fds[0].as_raw_fd())).unwrap();
    assert_eq!(link.to_str(), Some("anon_inode:[userfaultfd]"));

    // Nobody serves: the load waits for memory, and the call ends at its deadline.
    let e = put.await.unwrap().unwrap_err();
    assert!(matches!(e, ApiError::Timeout { .. }), "{e}");
    // Nothing more comes, and the socket is open for as long as Firecracker lives.
    stream.set_nonblocking(true).unwrap();
    let mut one = [0; 1];
    let silent = std::io::Read::read(&mut &stream, &mut one).unwrap_err();
    assert_eq!(silent.kind(), std::io::ErrorKind::WouldBlock);
    child.kill().unwrap();
    child.wait().unwrap();
    stream.set_nonblocking(false).unwrap();
    assert_eq!(std::io::Read::read(&mut &stream, &mut one).unwrap(), 0, "hang-up is death");
}
