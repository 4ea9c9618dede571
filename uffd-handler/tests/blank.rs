//! The shim in a program that was started ahead: it becomes what it is told, or nothing.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

mod rig;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use uffd_handler::fdpass;

/// A shell that waits. Where the shim has no effect, it says something and ends.
fn waiting() -> (Child, OwnedFd) {
    // Between its making and the start of the child, any other child would inherit the socket.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap();
    let (family, flags) = (AddressFamily::Unix, SockFlag::empty());
    let (here, there) = socketpair(family, SockType::SeqPacket, None, flags).unwrap();
    // Ours alone: the end of the connection is to be seen in the child.
    nix::fcntl::fcntl(&here, nix::fcntl::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).unwrap();
    let child = Command::new("/bin/sh")
        .args(["-c", "echo not waiting"])
        .env_clear()
        .env("LD_PRELOAD", rig::shim())
        .env("RETHAW_SHIM_WAIT", there.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    (child, here)
}

fn message(places: &[i32], directory: &str, args: &[&str], env: &[&str]) -> Vec<u8> {
    let mut message = (args.len() as u32).to_ne_bytes().to_vec();
    message.extend((env.len() as u32).to_ne_bytes());
    places.iter().for_each(|place| message.extend(place.to_ne_bytes()));
    for text in [directory].iter().chain(args).chain(env) {
        message.extend(text.as_bytes());
        message.push(0);
    }
    message
}

fn end(mut child: Child) -> Output {
    let deadline = Instant::now() + Duration::from_secs(20);
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn it_becomes_what_it_is_told() {
    let (child, socket) = waiting();
    std::thread::sleep(Duration::from_millis(100));
    let (mut answer, out) = pipe();
    let mut given = tempfile::tempfile().unwrap();
    given.write_all(b"what was given\n").unwrap();
    std::io::Seek::rewind(&mut given).unwrap();
    let script = "echo $0 $1; echo $THIS; pwd; cat <&3; tr '\\0' ' ' </proc/$$/cmdline; \
                  echo; echo $(ls -l /proc/$$/fd | grep -c socket:); env";
    let args = ["a-shell", "-c", script, "its-name", "an-argument"];
    // The socket's own number is among those given anew, as are numbers that came with the message.
    let places = [1, 2, 3, 9];
    let fds = [out.as_fd(), out.as_fd(), given.as_fd(), given.as_fd()];
    let told = message(&places, "/usr", &args, &["THIS=that", "PATH=/usr/bin:/bin"]);
    fdpass::send(socket.as_fd(), &told, &fds).unwrap();
    drop(out);
    let ended = end(child);
    assert!(ended.status.success(), "{ended:?}");
    let mut said = String::new();
    answer.read_to_string(&mut said).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(&lines[..4], ["its-name an-argument", "that", "/usr", "what was given"]);
    assert!(lines[4].starts_with("a-shell -c echo"), "ps would show {}", lines[4]);
    assert_eq!(lines[5], "0", "the socket is closed");
    assert!(!said.contains("RETHAW_SHIM_WAIT"), "{said}");
    assert_eq!(text(&ended.stdout), "", "nothing goes where it went before");
}

/// Reading end, writing end.
fn pipe() -> (File, OwnedFd) {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    (File::from(read), write)
}

#[test]
fn it_enters_a_network_namespace() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: entering a network namespace takes root");
        return;
    }
    let mut holder = Command::new("unshare").args(["-n", "sleep", "30"]).spawn().unwrap();
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let deadline = Instant::now() + Duration::from_secs(5);
    while namespace(holder.id()) == namespace(std::process::id()) {
        assert!(Instant::now() < deadline, "no namespace");
        std::thread::sleep(Duration::from_millis(5));
    }
    let netns = File::open(format!("/proc/{}/ns/net", holder.id())).unwrap();
    let wanted = namespace(holder.id()).unwrap();
    let (child, socket) = waiting();
    let args = ["sh", "-c", "readlink /proc/self/ns/net"];
    let told = message(&[-1], "/", &args, &["PATH=/usr/bin:/bin"]);
    fdpass::send(socket.as_fd(), &told, &[netns.as_fd()]).unwrap();
    let ended = end(child);
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(text(&ended.stdout).trim(), wanted.to_str().unwrap());
}

#[test]
fn it_ends_with_whoever_started_it() {
    let (child, socket) = waiting();
    drop(socket);
    let ended = end(child);
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(ended.stdout.is_empty() && ended.stderr.is_empty(), "{ended:?}");
}

#[test]
fn what_makes_no_sense_ends_it_with_a_message() {
    let null = File::open("/dev/null").unwrap();
    let whole = message(&[], "/", &["sh", "-c", "echo ran"], &[]);
    let one_more = [1_u32, 9].map(u32::to_ne_bytes).concat();
    let cases: [(Vec<u8>, &[BorrowedFd<'_>], &str); 6] = [
        (vec![1], &[], "told wrongly"),
        (whole[..whole.len() - 1].to_vec(), &[], "told wrongly"),
        ([&whole[..], b"more\0"].concat(), &[], "told wrongly"),
        ([&one_more[..], b"/\0sh\0"].concat(), &[], "told wrongly"),
        (message(&[], "/nowhere", &["sh"], &[]), &[], "working directory: errno 2"),
        (message(&[-1], "/", &["sh"], &[]), &[null.as_fd()], "network namespace: errno"),
    ];
    for (told, fds, why) in cases {
        let (child, socket) = waiting();
        fdpass::send(socket.as_fd(), &told, fds).unwrap();
        let ended = end(child);
        assert_eq!(ended.status.into_raw(), 1 << 8, "{why}: {ended:?}");
        assert!(text(&ended.stderr).contains(why), "{why}: {ended:?}");
        assert!(ended.stdout.is_empty(), "{why}: {ended:?}");
    }
}
