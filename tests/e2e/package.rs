//! The Debian package: made, looked into, and installed on a Debian 12 with systemd, which is what a
//! sandbox is. The guest has no network, so that what the package depends on does not come with it:
//! QEMU is copied in from this host, the programs that build guest images are missed.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::client::{Client, within};
use crate::service::{Service, id};

fn output(command: &mut Command) -> Vec<u8> {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    done.stdout
}

fn text(command: &mut Command) -> String {
    String::from_utf8(output(command)).unwrap()
}

/// Makes the package; the first time this builds cargo-deb.
async fn package() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/package");
    let made = tokio::task::spawn_blocking(move || text(&mut Command::new(script)));
    PathBuf::from(made.await.unwrap().lines().last().unwrap())
}

fn look_into(deb: &Path) {
    let control = text(Command::new("dpkg-deb").arg("-f").arg(deb));
    for wanted in ["Package: rethaw", "Architecture: amd64", "qemu-system-x86", "libc6 (>="] {
        assert!(control.contains(wanted), "{wanted}: {control}");
    }
    let list = text(Command::new("dpkg-deb").arg("-c").arg(deb));
    for wanted in [
        "./usr/bin/rethaw",
        "./usr/lib/rethaw/rethaw-pager",
        "./usr/lib/rethaw/rethaw-agent-static",
        "./usr/lib/rethaw/rethaw-kvm-probe",
        "./usr/lib/rethaw/librethaw_uffd_shim.so",
        "/systemd/system/rethaw.service",
        "./etc/rethaw/rethaw.toml",
        "./usr/share/man/man1/rethaw-exec.1.gz",
        "./usr/share/bash-completion/completions/rethaw",
        "./usr/share/zsh/vendor-completions/_rethaw",
        "./usr/share/doc/rethaw/operations.md",
    ] {
        assert!(list.contains(wanted), "{wanted} is not in\n{list}");
    }
}

/// QEMU with its libraries and firmware, as an archive.
fn qemu() -> Vec<u8> {
    let binary = "/usr/bin/qemu-system-x86_64";
    let libraries = text(Command::new("ldd").arg(binary));
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    let mut tar = Command::new("tar");
    tar.args(["--dereference", "-cz", "-P", binary, "/usr/share/qemu", "/usr/share/seabios"]);
    output(tar.args(libraries))
}

async fn upload(client: &Client, id: &str, path: &str, bytes: Vec<u8>) {
    let put = format!("/v1/sandboxes/{id}/files?path={path}");
    let reply = client.send("PUT", &put, &[], bytes).await;
    assert!((200..300).contains(&reply.status), "{}", reply.text());
}

/// Waits, in the guest, until its own service answers.
const WAIT: &str = "
import time, urllib.request
for _ in range(600):
    try:
        print(urllib.request.urlopen('http://127.0.0.1:7070/healthz').read().decode()); break
    except OSError:
        time.sleep(0.1)
else:
    raise SystemExit('no answer')
";

#[tokio::test]
async fn the_package_installs_and_its_service_runs_under_systemd() {
    let deb = package().await;
    look_into(&deb);
    let service = Service::start(1).await;
    let id = id(&service.create_with(&json!({ "timeout_seconds": 3600 })).await);
    let archive = tokio::task::spawn_blocking(qemu).await.unwrap();
    upload(service.client(), &id, "/root/qemu.tar.gz", archive).await;
    upload(service.client(), &id, "/root/rethaw.deb", std::fs::read(&deb).unwrap()).await;
    // Over what the guest has, its own C library for one, nothing is written.
    service.sh(&id, "tar -xz -P --skip-old-files -f /root/qemu.tar.gz; rm /root/qemu.tar.gz").await;

    service.sh(&id, "dpkg --force-depends -i /root/rethaw.deb 2>&1").await;
    let body = json!({ "argv": ["python3", "-c", WAIT] });
    let done = within("the service in the guest", service.exec(&id, &body)).await;
    let log = service.sh(&id, "journalctl -u rethaw --no-pager").await;
    assert!(done.stdout().contains("\"ok\""), "{}{log}", done.stderr());
    assert_eq!(service.sh(&id, "systemctl is-enabled rethaw").await, "enabled");
    assert_eq!(service.sh(&id, "stat -c %a:%U /var/lib/rethaw/api-key").await, "600:root");
    // The command line finds the service and its key; the hardening is in force.
    let version = service.sh(&id, "rethaw version").await;
    assert!(version.contains(concat!("service ", env!("CARGO_PKG_VERSION"))), "{version}");
    let status =
        "grep -E '^(NoNewPrivs|Seccomp):' /proc/$(systemctl show -P MainPID rethaw)/status";
    let status = service.sh(&id, status).await;
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
    // A reload does not end it, a restart takes it up again.
    let pid = service.sh(&id, "systemctl show -P MainPID rethaw").await;
    service.sh(&id, "systemctl reload rethaw").await;
    service.exec(&id, &body).await;
    assert_eq!(service.sh(&id, "systemctl show -P MainPID rethaw").await, pid);
    service.sh(&id, "systemctl restart rethaw").await;
    assert!(service.exec(&id, &body).await.stdout().contains("\"ok\""));

    // Removed, it leaves its data; purged, it leaves none of its settings.
    service.sh(&id, "dpkg -r rethaw 2>&1").await;
    service.sh(&id, "! systemctl is-active rethaw && test -f /var/lib/rethaw/api-key").await;
    service.sh(&id, "dpkg -P rethaw 2>&1; test ! -e /etc/rethaw/rethaw.toml").await;
    service.stop().await;
}
