//! The shim with the real QEMU: a guest is frozen, restored lazily, and compares all its memory.
//!
//! Skipped, loudly, where no QEMU is installed.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

#[path = "qemu_guest/code.rs"]
mod code;
mod rig;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use uffd_handler::handshake::{self, Expect};
use uffd_handler::source::ZeroMap;
use uffd_handler::supervisor::{MemoryPlan, PagerEvent};

const DEADLINE: Duration = Duration::from_secs(60);

struct Qemu {
    child: Child,
    dir: PathBuf,
}

impl Qemu {
    fn start(dir: &Path, memory: &str, extra: &[&str], env: &[(&str, &str)]) -> Self {
        std::fs::write(dir.join("firmware"), code::firmware()).unwrap();
        let _ = std::fs::remove_file(dir.join("qmp"));
        let qmp = format!("unix:{}/qmp,server=on,wait=off", dir.display());
        let console = format!("file,id=out,path={}/out", dir.display());
        let child = Command::new("qemu-system-x86_64")
            .args(["-M", "microvm,accel=tcg,memory-backend=mem", "-m", "32", "-cpu", "max"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-object", memory, "-qmp", &qmp, "-chardev", &console])
            .args(["-device", "isa-debugcon,iobase=0xe9,chardev=out"])
            .arg("-bios")
            .arg(dir.join("firmware"))
            .args(extra)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, dir: dir.to_path_buf() }
    }

    fn qmp(&self) -> Qmp {
        let path = self.dir.join("qmp");
        let end = Instant::now() + DEADLINE;
        let stream = loop {
            match UnixStream::connect(&path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < end, "QMP: {error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut qmp = Qmp { reader: BufReader::new(stream.try_clone().unwrap()), stream };
        let mut greeting = String::new();
        qmp.reader.read_line(&mut greeting).unwrap();
        qmp.command("qmp_capabilities", "{}");
        qmp
    }

    fn wait_output(&self, passes: usize) -> String {
        rig::eventually(DEADLINE, || {
            let mut out = String::new();
            File::open(self.dir.join("out")).ok()?.read_to_string(&mut out).ok()?;
            (out.len() >= passes).then_some(out)
        })
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Qmp {
    reader: BufReader<UnixStream>,
    stream: UnixStream,
}

impl Qmp {
    fn command(&mut self, name: &str, arguments: &str) -> String {
        writeln!(self.stream, "{{\"execute\":\"{name}\",\"arguments\":{arguments}}}").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.reader.read_line(&mut line).unwrap() > 0, "QMP closed at {name}");
            if line.contains("\"return\"") || line.contains("\"error\"") {
                assert!(!line.contains("\"error\""), "{name}: {line}");
                return line;
            }
        }
    }

    fn migrate(&mut self, command: &str, uri: &str) {
        let ignore = r#"{"capabilities":[{"capability":"x-ignore-shared","state":true}]}"#;
        self.command("migrate-set-capabilities", ignore);
        self.command(command, &format!("{{\"uri\":\"exec:{uri}\"}}"));
        rig::eventually(DEADLINE, || {
            let status = self.command("query-migrate", "{}");
            assert!(!status.contains("failed"), "{status}");
            status.contains("completed").then_some(())
        });
    }
}

fn freeze(dir: &Path) {
    let memory = dir.join("memory");
    File::create(&memory).unwrap().set_len(code::MEMORY_BYTES).unwrap();
    let backend =
        format!("memory-backend-file,id=mem,size=32M,share=on,mem-path={}", memory.display());
    let qemu = Qemu::start(dir, &backend, &[], &[]);
    assert!(!qemu.wait_output(2).contains('X'));
    let mut qmp = qemu.qmp();
    qmp.command("stop", "{}");
    qmp.migrate("migrate", &format!("cat > {}/state", dir.display()));
    qmp.command("quit", "{}");
}

#[test]
fn a_frozen_guest_thaws_with_all_its_memory() {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    freeze(dir);
    let zero = dir.join("memory.zero");
    ZeroMap::scan(&dir.join("memory")).unwrap().save(&zero).unwrap();
    let shim = rig::shim();
    let supervisor = rig::supervisor(dir);
    let events = supervisor.events();
    let shared = Path::new("/dev/shm").join(format!("rethaw-test-{}", std::process::id()));
    let backends = [
        "memory-backend-memfd,id=mem,size=32M,share=on".to_string(),
        format!("memory-backend-file,id=mem,size=32M,share=on,mem-path={}", shared.display()),
    ];
    for (i, backend) in backends.iter().enumerate() {
        let _ = std::fs::remove_file(dir.join("out"));
        let socket = dir.join(format!("handshake-{i}"));
        let listener = UnixListener::bind(&socket).unwrap();
        let qemu = Qemu::start(
            dir,
            backend,
            &["-S", "-incoming", "defer"],
            &[
                ("LD_PRELOAD", shim.to_str().unwrap()),
                ("RETHAW_UFFD_SIZE", &code::MEMORY_BYTES.to_string()),
                ("RETHAW_UFFD_SOCKET", socket.to_str().unwrap()),
            ],
        );
        let expect = Expect {
            memory_bytes: code::MEMORY_BYTES,
            peer_uid: Some(0),
            peer_pid: Some(qemu.child.id() as i32),
        };
        let handshake = handshake::accept(&listener, &expect, DEADLINE).unwrap();
        let id = format!("qemu-{i}");
        let plan = MemoryPlan::flat(dir.join("memory"), Some(zero.clone()));
        supervisor.add_vm(&id, handshake, &plan).unwrap();
        let mut qmp = qemu.qmp();
        qmp.migrate("migrate-incoming", &format!("cat {}/state", dir.display()));
        qmp.command("cont", "{}");
        let out = qemu.wait_output(3);
        assert!(!out.contains('X'), "the guest saw a wrong page: {out}");
        let stats = supervisor.vm_stats(&id).unwrap();
        assert!(stats.faults_data >= 31 * 256, "31 MiB were written: {stats:?}");
        drop(qemu);
        let gone = events.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(gone, PagerEvent::VmGone { id });
    }
    std::fs::remove_file(&shared).unwrap();
    supervisor.shutdown();
}

#[test]
fn without_a_page_server_qemu_does_not_run() {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let shim = rig::shim();
    let socket = dir.path().join("nobody");
    let mut qemu = Qemu::start(
        dir.path(),
        "memory-backend-memfd,id=mem,size=32M,share=on",
        &["-S"],
        &[
            ("LD_PRELOAD", shim.to_str().unwrap()),
            ("RETHAW_UFFD_SIZE", &code::MEMORY_BYTES.to_string()),
            ("RETHAW_UFFD_SOCKET", socket.to_str().unwrap()),
        ],
    );
    let status = rig::eventually(DEADLINE, || qemu.child.try_wait().unwrap());
    assert_eq!(status.code(), Some(1));
}
