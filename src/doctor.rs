//! `rethaw doctor`: what works on this host, and why the rest does not.

use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;
use snapshotter::firecracker::Binaries;

use crate::net::{NOTES, leftover};
use crate::paths::{Paths, in_path};

/// One finding.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    /// The service cannot run without it.
    required: bool,
    detail: String,
}

/// Prints the findings; fails if something the service needs is missing.
pub fn run(json: bool) -> anyhow::Result<ExitCode> {
    let home = crate::cli::home::default_home().unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let kvm = runtime.block_on(kvm());
    let firecracker = runtime.block_on(firecracker(&home));
    let network = runtime.block_on(network());
    let checks =
        [userfaultfd(), binaries(), qemu(), kvm, firecracker, network, real_time(), leftovers()];
    let broken = checks.iter().any(|c| c.required && !c.ok);
    if json {
        println!("{}", serde_json::to_string_pretty(&serde_json::json!({"checks": checks}))?);
    } else {
        for check in &checks {
            let mark = match (check.ok, check.required) {
                (true, _) => "ok  ",
                (false, true) => "FAIL",
                (false, false) => "no  ",
            };
            println!("{mark}  {:<12} {}", check.name, check.detail);
        }
    }
    Ok(if broken { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn userfaultfd() -> Check {
    let rights = uffd_handler::rights::probe();
    let (ok, detail) = match &rights.kernel_faults {
        Ok(()) => (true, "can be created, also for faults of the kernel".to_owned()),
        Err(e) => {
            let half =
                if rights.user_faults.is_ok() { " (for user faults only it can)" } else { "" };
            let help = "run as root or give access to /dev/userfaultfd";
            (false, format!("no userfaultfd{half}: {e}; {help}"))
        }
    };
    Check { name: "userfaultfd", ok, required: true, detail }
}

fn binaries() -> Check {
    match Paths::find() {
        Ok(paths) => {
            let detail = format!("page server, shim and agent beside {}", paths.pager.display());
            Check { name: "binaries", ok: true, required: true, detail }
        }
        Err(e) => Check { name: "binaries", ok: false, required: true, detail: e.to_string() },
    }
}

fn qemu() -> Check {
    let (ok, detail) = match in_path("qemu-system-x86_64") {
        Some(path) => (true, path.display().to_string()),
        None => (false, "not in PATH: apt-get install qemu-system-x86".to_owned()),
    };
    Check { name: "qemu", ok, required: true, detail }
}

async fn kvm() -> Check {
    let (ok, detail) = match crate::choose::probe_kvm().await {
        Ok(report) => (report.boots_linux(), report.to_string()),
        Err(e) => (false, format!("not probed: {e}")),
    };
    Check { name: "kvm", ok, required: false, detail }
}

async fn firecracker(home: &Path) -> Check {
    let (ok, detail) = match Binaries::find(home) {
        Err(e) => (false, e.to_string()),
        Ok(binaries) => match binaries.identify().await {
            Err(e) => (false, e.to_string()),
            Ok(identity) => {
                let (version, path) = (identity.version, binaries.firecracker.display());
                (true, format!("{version} in {path}; used where kvm works"))
            }
        },
    };
    Check { name: "firecracker", ok, required: false, detail }
}

/// What services that are no more left on this host.
fn leftovers() -> Check {
    let (ok, detail) = match leftover::find(Path::new(NOTES)) {
        Ok(found) if found.is_empty() => {
            (true, "no service that is gone left rules or switches".to_owned())
        }
        Ok(found) => {
            let all: Vec<_> = found.iter().map(ToString::to_string).collect();
            (false, format!("{}; `rethaw gc` removes it", all.join("; ")))
        }
        Err(e) => (false, format!("not looked for: {e}")),
    };
    Check { name: "leftovers", ok, required: false, detail }
}

fn real_time() -> Check {
    let ok = snapshotter::priority::real_time_is_allowed();
    let detail = match ok {
        true => "the service can go before the VMs it serves",
        false => {
            "claims wait for other work on a busy host: CAP_SYS_NICE or LimitRTPRIO=2 is missing"
        }
    };
    Check { name: "real-time", ok, required: false, detail: detail.to_owned() }
}

async fn network() -> Check {
    let (ok, detail) = match crate::net::probe().await {
        Ok(()) => {
            (true, "a slot with tap, addresses and rules was made and thrown away".to_owned())
        }
        Err(e) => (false, format!("sandboxes get no network: {e}")),
    };
    Check { name: "network", ok, required: false, detail }
}
