//! `rethaw doctor`: what works on this host, and why the rest does not.

use std::process::ExitCode;

use serde::Serialize;

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
    let checks = [userfaultfd(), binaries(), qemu(), kvm(), tun()];
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
    let (ok, detail) = match userfaultfd::UffdBuilder::new().create() {
        Ok(_) => (true, "can be created".to_owned()),
        Err(e) => {
            (false, format!("no userfaultfd: {e}; run as root or give access to /dev/userfaultfd"))
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

fn kvm() -> Check {
    let report = "not probed";
    Check { name: "kvm", ok: false, required: false, detail: report.to_string() }
}

fn tun() -> Check {
    let ok = std::fs::metadata("/dev/net/tun").is_ok();
    let detail = if ok { "/dev/net/tun is there" } else { "no /dev/net/tun: modprobe tun" };
    Check { name: "tun", ok, required: false, detail: detail.to_owned() }
}
