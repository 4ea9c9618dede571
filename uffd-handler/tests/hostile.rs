//! Handshakes of VMMs that lie, dawdle or are somebody else.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

mod rig;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use uffd_handler::fdpass;
use uffd_handler::handshake::{Expect, Handshake, HandshakeError, Region, accept};
use uffd_handler::region::RegionError;
use userfaultfd::{Uffd, UffdBuilder};

const MEMORY: u64 = 8 << 20;
const SHORT: Duration = Duration::from_millis(150);

fn userfaultfd(non_blocking: bool) -> Uffd {
    UffdBuilder::new().user_mode_only(true).non_blocking(non_blocking).create().unwrap()
}

fn borrow(fd: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to what is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

fn json(regions: &[(u64, u64, u64)]) -> Vec<u8> {
    let wire: Vec<_> = regions
        .iter()
        .map(|(base, size, offset)| {
            serde_json::json!({"base_host_virt_addr": base, "size": size, "offset": offset,
                "page_size_kib": 4096, "of_the_future": {"gpa_start": 1}})
        })
        .collect();
    serde_json::to_vec(&wire).unwrap()
}

fn honest() -> Vec<u8> {
    json(&[(0x10_0000, 3 << 20, 0), (0x4000_0000, 5 << 20, 3 << 20)])
}

/// Has a client do something and accepts it.
fn shake(client: impl FnOnce(UnixStream) + Send) -> Result<Handshake, HandshakeError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let expect = Expect { memory_bytes: MEMORY, ..Expect::default() };
    std::thread::scope(|scope| {
        scope.spawn(|| client(UnixStream::connect(&path).unwrap()));
        let began = Instant::now();
        let outcome = accept(&listener, &expect, SHORT);
        assert!(began.elapsed() < SHORT * 20, "the deadline holds");
        outcome
    })
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let _ = fdpass::send(stream.as_fd(), bytes, fds);
}

/// Keeps the connection open for longer than anybody waits.
fn dawdle(stream: UnixStream) {
    std::thread::sleep(SHORT * 2);
    drop(stream);
}

#[test]
fn an_honest_vmm_is_taken_at_its_word() {
    let handshake = shake(|stream| {
        send(&stream, &honest(), &[borrow(&userfaultfd(true))]);
        dawdle(stream);
    })
    .unwrap();
    assert_eq!(handshake.peer_pid, std::process::id() as i32);
    let second = Region { base: 0x4000_0000, size: 5 << 20, offset: 3 << 20, page_size: 4096 };
    assert_eq!(handshake.regions[1], second);
}

#[test]
fn a_message_in_pieces_is_put_together() {
    // The descriptor comes with the first byte, in the middle, or after the last.
    for at in [0, 40, honest().len() - 1] {
        shake(move |stream| {
            let uffd = userfaultfd(true);
            for (i, byte) in honest().iter().enumerate() {
                let fd = [borrow(&uffd)];
                send(&stream, &[*byte], if i == at { &fd } else { &[] });
            }
            dawdle(stream);
        })
        .unwrap();
    }
}

#[test]
fn silence_and_half_sentences_time_out() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
    let outcome = accept(&listener, &Expect::default(), SHORT);
    assert!(matches!(outcome, Err(HandshakeError::NobodyCame { refused: 0, .. })));
    let outcome = shake(dawdle);
    assert!(matches!(outcome, Err(HandshakeError::TimedOut { bytes: 0, fds: 0, .. })));
    let outcome = shake(|stream| {
        send(&stream, &honest(), &[]);
        dawdle(stream);
    });
    assert!(matches!(outcome, Err(HandshakeError::TimedOut { fds: 0, .. })));
    let outcome = shake(|stream| send(&stream, &honest()[..20], &[borrow(&userfaultfd(true))]));
    assert!(matches!(outcome, Err(HandshakeError::Closed { bytes: 20, fds: 1, .. })));
}

#[test]
fn wrong_descriptors_are_refused() {
    let with = |fds: &(dyn Fn(&UnixStream) + Sync)| {
        shake(|stream| {
            fds(&stream);
            dawdle(stream);
        })
        .unwrap_err()
    };
    let outcome = with(&|stream| {
        send(stream, &honest(), &[borrow(&File::open("/dev/null").unwrap())]);
    });
    assert!(matches!(outcome, HandshakeError::NotUserfaultfd { found: 0, sent: 1 }));
    let outcome = with(&|stream| {
        let (one, two) = (userfaultfd(true), userfaultfd(true));
        send(stream, &honest(), &[borrow(&one), borrow(&two)]);
    });
    assert!(matches!(outcome, HandshakeError::NotUserfaultfd { found: 2, sent: 2 }));
    let outcome = with(&|stream| {
        let many: Vec<File> = (0..20).map(|_| File::open("/dev/null").unwrap()).collect();
        send(stream, &honest(), &many.iter().map(borrow).collect::<Vec<_>>());
    });
    assert!(matches!(outcome, HandshakeError::TooManyFds(20)));
    let outcome = with(&|stream| send(stream, &honest(), &[borrow(&userfaultfd(false))]));
    assert!(matches!(outcome, HandshakeError::Blocking));
}

#[test]
fn wrong_regions_are_refused() {
    let with = |bytes: Vec<u8>| {
        shake(|stream| {
            send(&stream, &bytes, &[borrow(&userfaultfd(true))]);
            dawdle(stream);
        })
        .unwrap_err()
    };
    let overlapping = json(&[(0x10_0000, 4 << 20, 0), (0x20_0000, 4 << 20, 4 << 20)]);
    let outcome = with(overlapping);
    assert!(matches!(outcome, HandshakeError::Regions(RegionError::Overlap(..))), "{outcome}");
    let outcome = with(json(&[(0x10_0000, 1 << 40, 0)]));
    assert!(matches!(outcome, HandshakeError::Regions(RegionError::Total { .. })), "{outcome}");
    let outcome = with(json(&[(u64::MAX - 4095, MEMORY, 0)]));
    assert!(matches!(outcome, HandshakeError::Regions(RegionError::OutOfRange(_))), "{outcome}");
    assert!(matches!(with(b"[{\"size\":-1}]".to_vec()), HandshakeError::NotRegions(_)));
    assert!(matches!(with(b"{}".to_vec()), HandshakeError::NotRegions(_)));
    let mut trailing = honest();
    trailing.extend_from_slice(b"[]");
    assert!(matches!(with(trailing), HandshakeError::NotRegions(_)));
    assert!(matches!(with(vec![b' '; 100 << 10]), HandshakeError::TooLong));
}

#[test]
fn a_stranger_does_not_take_the_vmms_place() {
    let dir = tempfile::tempdir().unwrap();
    let setup = rig::setup(dir.path(), "vm", &[16]);
    let listener = UnixListener::bind(&setup.handshake).unwrap();
    let stranger = UnixStream::connect(&setup.handshake).unwrap();
    let vmm = rig::fake_vmm::FakeVmm::start(&setup);
    let expect = Expect {
        memory_bytes: 16 * 4096,
        peer_uid: Some(nix::unistd::getuid().as_raw()),
        peer_pid: Some(vmm.pid()),
    };
    let handshake = accept(&listener, &expect, rig::DEADLINE).unwrap();
    assert_eq!(handshake.peer_pid, vmm.pid());
    // Refused means closed.
    assert_eq!(std::io::Read::read(&mut &stranger, &mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_handshake_happens_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let (uffd, again) = (userfaultfd(true), userfaultfd(true));
    let first = UnixStream::connect(&path).unwrap();
    // A second connection is already waiting when the first is accepted.
    let second = UnixStream::connect(&path).unwrap();
    send(&first, &honest(), &[borrow(&uffd)]);
    send(&second, &honest(), &[borrow(&again)]);
    let expect = Expect { memory_bytes: MEMORY, ..Expect::default() };
    accept(&listener, &expect, rig::DEADLINE).unwrap();
    // Who has the handshake closes the socket; nobody else gets through.
    drop(listener);
    second.set_read_timeout(Some(rig::DEADLINE)).unwrap();
    assert!(matches!(std::io::Read::read(&mut &second, &mut [0; 1]), Ok(0) | Err(_)));
    assert!(UnixStream::connect(&path).is_err());
}

#[test]
fn a_vmm_that_ended_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let pid = child.id() as i32;
    let expect = Expect { peer_pid: Some(pid), ..Expect::default() };
    let began = Instant::now();
    let outcome = accept(&listener, &expect, rig::DEADLINE);
    assert!(matches!(outcome, Err(HandshakeError::VmmEnded(ended)) if ended == pid));
    assert!(began.elapsed() < rig::DEADLINE / 2);
    child.wait().unwrap();
    assert!(matches!(accept(&listener, &expect, rig::DEADLINE), Err(HandshakeError::VmmEnded(_))));
}

fn accept_bytes(path: &Path, bytes: &[u8]) -> Result<Handshake, HandshakeError> {
    let listener = UnixListener::bind(path).unwrap();
    let client = UnixStream::connect(path).unwrap();
    let uffd = userfaultfd(true);
    send(&client, bytes, &[borrow(&uffd)]);
    drop(client);
    accept(&listener, &Expect { memory_bytes: MEMORY, ..Expect::default() }, rig::DEADLINE)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any change of an honest message is refused, or is one that changes nothing that counts.
    #[test]
    fn mangled_handshakes_never_get_through(at in 0_usize..200, byte in any::<u8>(), cut in 0_usize..200) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = honest();
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(bytes.len() - cut.saturating_sub(100).min(bytes.len() - 1));
        if let Ok(handshake) = accept_bytes(&dir.path().join("socket"), &bytes) {
            let total: u64 = handshake.regions.iter().map(|region| region.size).sum();
            prop_assert_eq!(total, MEMORY);
            let apart = handshake.regions[0].base + handshake.regions[0].size
                <= handshake.regions[1].base
                || handshake.regions[1].base + handshake.regions[1].size
                    <= handshake.regions[0].base;
            prop_assert!(apart);
        }
    }
}
