//! Settle, identity, freeze and resume, with real system calls: each test runs in mount, UTS and
//! network namespaces of its own, on a temporary root, with a cgroup v2 that only it uses. Needs
//! root.
#![cfg(feature = "client")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{SOON, run};
use guest_agent::agent::{Agent, Config};
use guest_agent::client::{AgentClient, AgentError};
use guest_agent::transport::serve_session;
use guest_agent::wire::{
    AgentState, Base64, ClaimRequest, ExecFrame, ExecRequest, FreezeRequest, ITEMS,
    IdentityFailure, IdentityRequest, Ipv4Config, Ipv6Config, ResumeRequest, SettleRequest,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::UnixStream;

/// A machine of its own, as far as namespaces go. Namespaces belong to the thread, so each test's
/// work is done on one.
struct Machine {
    root: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Machine {
    fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWNET)
            .expect("these tests need root");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let root = tempfile::tempdir().unwrap();
        for dir in [
            "etc/rethaw/restore.d",
            "usr/lib/systemd",
            "var/lib/systemd",
            "var/lib/dbus",
            "run",
            "cgroup",
            "tmp",
        ] {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        let put = |path: &str, text: &str| fs::write(root.path().join(path), text).unwrap();
        put("etc/hostname", "golden\n");
        put("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 golden\n");
        put("etc/machine-id", "0123456789abcdef0123456789abcdef\n");
        put("var/lib/dbus/machine-id", "0123456789abcdef0123456789abcdef\n");
        put("var/lib/systemd/random-seed", "seed");
        put("usr/lib/systemd/systemd-journald", "");
        // As in a guest, where it is in memory.
        let run = root.path().join("run");
        mount(Some("none"), &run, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        nix::unistd::sethostname("golden").unwrap();
        let hierarchy = root.path().join("cgroup");
        mount(Some("none"), &hierarchy, Some("cgroup2"), MsFlags::empty(), none).unwrap();
        let name = root.path().file_name().unwrap().to_str().unwrap().trim_start_matches('.');
        let cgroup = hierarchy.join(format!("rethaw-test-{name}"));
        fs::create_dir(&cgroup).unwrap();
        let ip = ["link", "add", "eth0", "type", "veth", "peer", "name", "peer0"];
        assert!(Command::new("ip").args(ip).status().unwrap().success());
        let up = ["link", "set", "peer0", "up"];
        assert!(Command::new("ip").args(up).status().unwrap().success());
        let old = ["addr", "add", "192.0.2.7/24", "dev", "eth0"];
        assert!(Command::new("ip").args(old).status().unwrap().success());
        Self { root, cgroup }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    /// A process that executes this program of systemd's.
    fn systemd(&self, name: &str) -> Child {
        let program = self.path("usr/lib/systemd").join(name);
        fs::copy("/bin/sleep", &program).unwrap();
        // Another thread that starts a process holds what was just written open for a moment.
        loop {
            match Command::new(&program).arg("60").spawn() {
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {}
                child => return child.unwrap(),
            }
        }
    }

    /// The same in the journal daemon's group.
    fn journald(&self, name: &str) -> Child {
        let child = self.systemd(name);
        let group = self.cgroup.join("rethaw.slice/rethaw-workload.slice/systemd-journald.service");
        fs::create_dir_all(&group).unwrap();
        fs::write(group.join("cgroup.procs"), child.id().to_string()).unwrap();
        child
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    async fn agent(&self) -> AgentClient {
        let config = Config {
            root: self.root.path().to_owned(),
            cgroup: Some(self.cgroup.clone()),
            ..Config::default()
        };
        let (host, guest) = UnixStream::pair().unwrap();
        let agent = Rc::new(Agent::new(config));
        tokio::task::spawn_local(serve_session(guest, agent, false));
        AgentClient::connect_session(host, SOON).await.unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let slice = self.cgroup.join("rethaw.slice/rethaw-workload.slice");
        let _ = fs::write(slice.join("cgroup.freeze"), "0");
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        for _ in 0..200 {
            let procs = fs::read_to_string(slice.join("rethaw-exec/cgroup.procs"));
            if procs.unwrap_or_default().is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let journald = slice.join("systemd-journald.service");
        let parent = self.cgroup.join("rethaw.slice");
        for dir in [slice.join("rethaw-exec"), journald, slice, parent, self.cgroup.clone()] {
            let _ = fs::remove_dir(dir);
        }
        let mounts = ["etc/hostname", "etc/hosts", "etc/machine-id", "etc/resolv.conf", "run"];
        for mount in mounts.iter().chain(&["cgroup"]) {
            let _ = umount2(&self.path(mount), MntFlags::MNT_DETACH);
        }
    }
}

/// Runs a test on a machine of its own.
fn on_machine<F: Future<Output = ()>>(test: impl FnOnce(Rc<Machine>) -> F + Send + 'static) {
    let work = move || {
        let machine = Rc::new(Machine::new());
        let keep = Rc::clone(&machine);
        run(async move { test(machine).await });
        drop(keep);
    };
    std::thread::spawn(work).join().unwrap();
}

fn now() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

fn identity(n: u8) -> IdentityRequest {
    IdentityRequest {
        generation: format!("00000000-0000-4000-8000-0000000000{n:02x}"),
        entropy: Base64((0..64).map(|i| i ^ n).collect()),
        wall_clock_unix_nanos: now(),
        mac: Some(format!("02:00:00:00:00:{n:02x}")),
        ipv4: Some(Ipv4Config { cidr: "10.9.8.2/30".into(), gateway: Some("10.9.8.1".into()) }),
        ipv6: Some(Ipv6Config { cidr: "fd00:9::2/64".into(), gateway: Some("fd00:9::1".into()) }),
        dns: vec!["10.9.8.1".into()],
        hostname: format!("vm-{n:02x}"),
        machine_id: format!("{n:02x}").repeat(16),
        boot_id: format!("10000000-0000-4000-8000-0000000000{n:02x}"),
        access_token: Some(format!("token-{n}")),
        ..Default::default()
    }
}

async fn output(client: &AgentClient, script: &str) -> String {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    let request = ExecRequest { argv, cwd: Some("/".into()), ..Default::default() };
    let mut stream = client.exec(&request, SOON).await.unwrap();
    let mut text = Vec::new();
    while let Some(frame) = stream.next_frame().await.unwrap() {
        if let ExecFrame::Stdout(chunk) = frame {
            text.extend(chunk.into_bytes().unwrap());
        }
    }
    String::from_utf8(text).unwrap()
}

fn code<T: std::fmt::Debug>(result: Result<T, AgentError>) -> (u16, String) {
    match result {
        Err(AgentError::Refused { status, error_code, .. }) => (status, error_code),
        other => panic!("not refused: {other:?}"),
    }
}

/// A program of the workload that writes a line again and again.
async fn ticker(client: &AgentClient, file: &Path) {
    let script = format!("while :; do echo tick >> {}; sleep 0.01; done", file.display());
    let argv = ["sh".to_owned(), "-c".to_owned(), script];
    let request = ExecRequest { argv: argv.to_vec(), background: true, ..Default::default() };
    client.exec(&request, SOON).await.unwrap();
    while fs::metadata(file).map_or(0, |m| m.len()) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn grows(file: &Path) -> bool {
    let before = fs::metadata(file).unwrap().len();
    tokio::time::sleep(Duration::from_millis(150)).await;
    fs::metadata(file).unwrap().len() > before
}

#[test]
fn a_settled_machine_takes_one_identity_and_runs() {
    on_machine(|machine| async move {
        let client = machine.agent().await;
        let ticks = machine.path("tmp-ticks");
        ticker(&client, &ticks).await;
        assert_eq!(code(client.identity(&identity(1), SOON).await), (409, "wrong_state".into()));

        let settle = SettleRequest { drop_caches: false, vacuum: true };
        let report = client.settle(&settle, SOON).await.unwrap();
        assert_eq!(report.state, AgentState::Settled);
        assert!(report.frozen_processes >= 1, "{report:?}");
        assert!(!machine.path("var/lib/systemd/random-seed").exists());
        assert!(!grows(&ticks).await, "the workload is still running");
        let exec = ExecRequest { argv: vec!["true".into()], ..Default::default() };
        assert_eq!(code(client.exec(&exec, SOON).await), (409, "identity_pending".into()));
        let claim = ClaimRequest { wall_clock_unix_nanos: now(), ..Default::default() };
        assert_eq!(code(client.claim(&claim, SOON).await), (409, "identity_pending".into()));

        let request = identity(0x2a);
        let report = client.identity(&request, SOON).await.unwrap();
        let proof = report.prove(&request).unwrap();
        let names: Vec<&str> = proof.report().items.iter().map(|i| i.item.as_str()).collect();
        assert_eq!(names, ITEMS);
        for item in &proof.report().items {
            let same = matches!(item.item.as_str(), "random_seed" | "sockets" | "journald");
            let changed = item.old_digest != item.new_digest;
            assert!(item.skipped.is_some() || same || changed, "{item:?}");
        }

        assert_eq!(machine.read("etc/machine-id"), format!("{}\n", "2a".repeat(16)));
        assert_eq!(
            fs::read_link(machine.path("var/lib/dbus/machine-id")).unwrap(),
            Path::new("/etc/machine-id")
        );
        assert_eq!(machine.read("etc/hostname"), "vm-2a\n");
        // Written in memory: the disk has what the template had.
        let device = |path: &str| fs::metadata(machine.path(path)).unwrap().dev();
        for path in ["etc/hostname", "etc/hosts", "etc/machine-id"] {
            assert_eq!(device(path), device("run"), "{path}");
        }
        umount2(&machine.path("etc/hostname"), MntFlags::MNT_DETACH).unwrap();
        assert_eq!(machine.read("etc/hostname"), "golden\n");
        assert_eq!(machine.read("etc/hosts"), "127.0.0.1 localhost\n127.0.1.1\tvm-2a\n");
        assert_eq!(machine.read("etc/resolv.conf"), "nameserver 10.9.8.1\n");
        assert_eq!(machine.read("run/rethaw/generation").trim(), request.generation);
        assert_eq!(machine.read("run/rethaw/access-token"), "token-42");
        assert_eq!(output(&client, "hostname").await, "vm-2a\n");
        let boot_id = output(&client, "cat /proc/sys/kernel/random/boot_id").await;
        assert_eq!(boot_id.trim(), request.boot_id);
        let link =
            output(&client, "ip -o link show eth0; ip -o addr show eth0; ip route; ip -6 route")
                .await;
        for wanted in [
            "02:00:00:00:00:2a",
            "10.9.8.2/30",
            "fd00:9::2/64",
            "default via 10.9.8.1 dev eth0",
            "default via fd00:9::1",
        ] {
            assert!(link.contains(wanted), "{wanted} is not in {link}");
        }
        assert!(!link.contains("192.0.2.7"), "the template's address is still there: {link}");
        assert!(grows(&ticks).await, "the workload does not run");
        let health = client.health(SOON).await.unwrap();
        assert_eq!(health.generation.as_deref(), Some(request.generation.as_str()));
        assert_eq!(health.state, AgentState::Live);
        assert_eq!(code(client.identity(&identity(3), SOON).await), (409, "wrong_state".into()));
    });
}

#[test]
fn each_item_that_fails_leaves_a_machine_that_does_nothing() {
    // There is no SSH server in these machines.
    for item in ITEMS.iter().copied().filter(|item| *item != "ssh_host_keys") {
        on_machine(move |machine| async move {
            let hook = machine.path("etc/rethaw/restore.d/10-true");
            fs::write(&hook, "#!/bin/sh\nexit 0\n").unwrap();
            fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
            let client = machine.agent().await;
            let ticks = machine.path("tmp-ticks");
            ticker(&client, &ticks).await;
            fs::write(machine.path("etc/rethaw/fault-injection"), format!("{item}\n")).unwrap();
            client.settle(&SettleRequest::default(), SOON).await.unwrap();
            let request = identity(7);
            let report = client.identity(&request, SOON).await.unwrap();
            if item == "sockets"
                && report.items.iter().any(|i| i.item == item && i.skipped.is_some())
            {
                return; // this kernel does not list sockets
            }
            assert_eq!(report.items.last().unwrap().item, item, "nothing follows a failure");
            assert!(!report.items.last().unwrap().is_verified());
            match report.prove(&request) {
                Err(IdentityFailure::ItemFailed { item: failed, .. }) => assert_eq!(failed, item),
                other => panic!("{item}: {other:?}"),
            }
            assert!(!grows(&ticks).await, "{item}: the workload runs");
            let exec = ExecRequest { argv: vec!["true".into()], ..Default::default() };
            let failed = (409, "identity_failed".to_owned());
            assert_eq!(code(client.exec(&exec, SOON).await), failed);
            let again = code(client.identity(&identity(8), SOON).await);
            assert_eq!(again, (409, "wrong_state".into()), "{item}: no second try");
            assert_eq!(client.health(SOON).await.unwrap().state, AgentState::IdentityFailed);
        });
    }
}

#[test]
fn no_journald_that_read_another_machine_id_outlives_an_identity() {
    on_machine(|machine| async move {
        let client = machine.agent().await;
        let journal = "run/log/journal/0123456789abcdef0123456789abcdef";
        fs::create_dir_all(machine.path(journal)).unwrap();
        let mut template = machine.journald("systemd-journald");
        client.settle(&SettleRequest { vacuum: false, ..Default::default() }, SOON).await.unwrap();
        let killed = |child: &mut Child| {
            child.try_wait().unwrap().and_then(|status| status.signal()) == Some(libc::SIGKILL)
        };
        assert!(killed(&mut template), "the template's runs on");
        assert!(!machine.path(journal).exists(), "the template's journal is there");

        // As systemd starts the next one: stopped before it has become journald.
        let mut next = machine.journald("systemd");
        let request = identity(1);
        client.identity(&request, SOON).await.unwrap().prove(&request).unwrap();
        assert_eq!(next.try_wait().unwrap(), None, "the clone's was killed");

        // A fork's source has one that runs.
        let mut source = machine.journald("systemd-journald");
        client.freeze(&FreezeRequest::default(), SOON).await.unwrap();
        let request = identity(2);
        let proof = client.identity(&request, SOON).await.unwrap().prove(&request).unwrap();
        let item = proof.report().items.iter().find(|i| i.item == "journald").unwrap();
        assert!(item.is_verified() && item.old_digest != item.new_digest, "{item:?}");
        assert!(killed(&mut source), "the source's runs on");
        assert_eq!(next.try_wait().unwrap(), None, "the clone's was killed");
        next.kill().unwrap();
        next.wait().unwrap();
    });
}

#[test]
fn a_journald_that_cannot_be_frozen_makes_no_template() {
    on_machine(|machine| async move {
        let client = machine.agent().await;
        let mut stray = machine.systemd("systemd-journald");
        let refused = client.settle(&SettleRequest::default(), SOON).await;
        let text = format!("{:?}", refused.unwrap_err());
        assert!(text.contains("journald") && text.contains("rethaw-workload.slice"), "{text}");
        assert_eq!(client.health(SOON).await.unwrap().state, AgentState::Live);
        stray.kill().unwrap();
        stray.wait().unwrap();
        client.settle(&SettleRequest::default(), SOON).await.unwrap();
    });
}

#[test]
fn a_machine_without_journald_says_so() {
    on_machine(|machine| async move {
        fs::remove_file(machine.path("usr/lib/systemd/systemd-journald")).unwrap();
        let client = machine.agent().await;
        client.settle(&SettleRequest::default(), SOON).await.unwrap();
        let request = identity(1);
        let proof = client.identity(&request, SOON).await.unwrap().prove(&request).unwrap();
        let item = proof.report().items.iter().find(|i| i.item == "journald").unwrap();
        assert_eq!(item.skipped.as_deref(), Some("the template has no journald"));
    });
}

#[test]
fn requests_that_cannot_be_an_identity_change_nothing() {
    on_machine(|machine| async move {
        let client = machine.agent().await;
        client.settle(&SettleRequest::default(), SOON).await.unwrap();
        let bad: Vec<fn(&mut IdentityRequest)> = vec![
            |r| r.generation = "x".into(),
            |r| r.entropy = Base64(vec![1; 32]),
            |r| r.entropy = Base64(vec![0; 64]),
            |r| r.wall_clock_unix_nanos = 5,
            |r| r.mac = Some("01:00:00:00:00:00".into()),
            |r| r.ipv4 = Some(Ipv4Config { cidr: "fd00::1/64".into(), gateway: None }),
            |r| r.dns = vec!["nowhere".into()],
            |r| r.hostname = "-x".into(),
            |r| r.machine_id = "0".repeat(32),
            |r| r.boot_id = String::new(),
            |r| drop(r.env.insert("A=B".into(), String::new())),
        ];
        for (i, spoil) in bad.iter().enumerate() {
            let mut request = identity(1);
            spoil(&mut request);
            let (status, _) = code(client.identity(&request, SOON).await);
            assert!(status == 400 || status == 422, "request {i} got {status}");
            assert_eq!(client.health(SOON).await.unwrap().state, AgentState::Settled);
            assert_eq!(machine.read("etc/hostname"), "golden\n");
        }
    });
}

#[test]
fn hooks_see_the_identity_and_must_succeed_in_time() {
    for (script, good) in [
        ("#!/bin/sh\necho $RETHAW_GENERATION $RETHAW_HOSTNAME $RETHAW_POOL > $OUT\n", true),
        ("#!/bin/sh\necho why not >&2\nexit 3\n", false),
        ("#!/bin/sh\nsleep 60\n", false),
    ] {
        on_machine(move |machine| async move {
            let hook = machine.path("etc/rethaw/restore.d/50-hook");
            let out = machine.path("hook-out");
            fs::write(&hook, script.replace("$OUT", out.to_str().unwrap())).unwrap();
            fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
            fs::write(machine.path("etc/rethaw/restore.d/README"), "not a hook").unwrap();
            let client = machine.agent().await;
            client.settle(&SettleRequest::default(), SOON).await.unwrap();
            let mut request = identity(5);
            request.hooks_timeout_seconds = Some(0.5);
            request.extra.insert("pool".into(), "p1".into());
            let report = client.identity(&request, SOON).await.unwrap();
            assert_eq!(report.prove(&request).is_ok(), good, "{script}");
            if good {
                let wanted = format!("{} vm-05 p1\n", request.generation);
                assert_eq!(fs::read_to_string(out).unwrap(), wanted);
            }
        });
    }
}

#[test]
fn a_frozen_machine_resumes_as_itself_and_a_fork_becomes_another() {
    on_machine(|machine| async move {
        let client = machine.agent().await;
        let ticks = machine.path("tmp-ticks");
        ticker(&client, &ticks).await;
        let claim = ClaimRequest {
            wall_clock_unix_nanos: now(),
            access_token: Some("first".into()),
            env: [("COLOUR".to_owned(), "green".to_owned())].into(),
        };
        let report = client.claim(&claim, SOON).await.unwrap();
        assert!(report.clock_error_nanos.abs() < 1_000_000_000);
        assert_eq!(output(&client, "echo $COLOUR").await, "green\n");

        client.freeze(&FreezeRequest::default(), SOON).await.unwrap();
        assert!(!grows(&ticks).await);
        let resume = ResumeRequest {
            entropy: Base64((1..65).collect()),
            wall_clock_unix_nanos: now(),
            ..Default::default()
        };
        let lazy = ResumeRequest { entropy: Base64(vec![]), ..resume.clone() };
        assert_eq!(code(client.resume(&lazy, SOON).await), (400, "invalid_request".into()));
        assert!(!grows(&ticks).await, "a refused resume lets nothing run");
        client.resume(&resume, SOON).await.unwrap();
        assert!(grows(&ticks).await);
        assert_eq!(output(&client, "echo $COLOUR").await, "green\n");
        assert_eq!(machine.read("run/rethaw/access-token"), "first");

        client.freeze(&FreezeRequest::default(), SOON).await.unwrap();
        let request = identity(9);
        client.identity(&request, SOON).await.unwrap().prove(&request).unwrap();
        assert!(grows(&ticks).await);
        assert_eq!(machine.read("run/rethaw/access-token"), "token-9");
    });
}

#[test]
fn an_agent_that_is_started_again_knows_where_it_was() {
    on_machine(|machine| async move {
        let client = machine.agent().await;
        client.settle(&SettleRequest::default(), SOON).await.unwrap();
        let successor = machine.agent().await;
        let exec = ExecRequest { argv: vec!["true".into()], ..Default::default() };
        assert_eq!(code(successor.exec(&exec, SOON).await), (409, "identity_pending".into()));
        let request = identity(4);
        successor.identity(&request, SOON).await.unwrap().prove(&request).unwrap();
        let health = machine.agent().await.health(SOON).await.unwrap();
        assert_eq!(health.state, AgentState::Live);
        assert_eq!(health.generation, Some(request.generation));

        fs::write(machine.path("etc/rethaw/fault-injection"), "token").unwrap();
        successor.settle(&SettleRequest::default(), SOON).await.unwrap();
        successor.identity(&identity(5), SOON).await.unwrap();
        let health = machine.agent().await.health(SOON).await.unwrap();
        assert_eq!((health.state, health.generation), (AgentState::IdentityFailed, None));
    });
}
