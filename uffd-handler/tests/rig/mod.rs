//! What the integration tests share: a supervisor with a real page server, fake VMMs with memory
//! whose every byte is known, and waiting with a limit.
#![allow(dead_code, reason = "every test binary uses its own part")]

pub mod fake_vmm;
pub mod oracle;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use fake_vmm::{FakeVmm, Setup};
use uffd_handler::handshake::{self, Expect, Handshake};
use uffd_handler::supervisor::{Supervisor, SupervisorConfig};

/// How long anything may take that is not being measured.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A supervisor whose page server lives in `dir`.
pub fn config(dir: &Path) -> SupervisorConfig {
    let mut config =
        SupervisorConfig::new(env!("CARGO_BIN_EXE_rethaw-pager"), dir.join("pager.sock"));
    config.idle_exit = Duration::from_secs(2);
    config.log_level = std::env::var("RETHAW_LOG").unwrap_or("error".into());
    // A machine busy with other tests may give a page server no time for a second: replacing it for
    // that is right, and not what any test here is about but one, which sets its own.
    config.heartbeat = DEADLINE;
    config.deadline = DEADLINE;
    config
}

/// Starts it.
pub fn supervisor(dir: &Path) -> Supervisor {
    Supervisor::start(config(dir)).unwrap()
}

/// Settings of a fake VMM with its sockets in `dir`.
pub fn setup(dir: &Path, name: &str, regions: &[u64]) -> Setup {
    Setup {
        handshake: dir.join(format!("{name}.handshake")),
        commands: dir.join(format!("{name}.commands")),
        regions: regions.to_vec(),
        huge: false,
        shared: false,
        removes: true,
        seed: 7,
    }
}

/// Starts a fake VMM and accepts its handshake.
pub fn start(setup: &Setup) -> (FakeVmm, Handshake) {
    let listener = UnixListener::bind(&setup.handshake).unwrap();
    let vmm = FakeVmm::start(setup);
    let expect = Expect {
        memory_bytes: setup.regions.iter().sum::<u64>() * 4096,
        peer_uid: None,
        peer_pid: Some(vmm.pid()),
    };
    let handshake = handshake::accept(&listener, &expect, DEADLINE).unwrap();
    (vmm, handshake)
}

/// Calls until there is something, and fails the test when that takes too long.
pub fn eventually<T>(limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < end, "nothing within {limit:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The shim, built like this test.
pub fn shim() -> PathBuf {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--package", "rethaw-uffd-shim"]);
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    assert!(build.status().unwrap().success());
    // This test lies in <target>/<profile>/deps.
    let mut dir = std::env::current_exe().unwrap();
    dir.pop();
    dir.pop();
    dir.join("librethaw_uffd_shim.so")
}

/// Runs a test of the caller's file as another process, told so by `variable`; gives the process ids it says.
pub fn start_process(
    test: &str,
    variable: &str,
    dir: &Path,
) -> (std::process::Child, Vec<nix::unistd::Pid>) {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(variable, dir)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    use std::io::BufRead as _;
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let line = lines.find_map(|line| line.unwrap().strip_prefix("serving ").map(String::from));
    let pids = line
        .unwrap()
        .split(' ')
        .map(|pid| nix::unistd::Pid::from_raw(pid.parse().unwrap()))
        .collect();
    (child, pids)
}
