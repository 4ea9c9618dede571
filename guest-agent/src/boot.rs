//! How the guest's boot went, as systemd itself tells it. Asked while a template is made, so tools
//! may be run here.

use crate::exec::tool::{self, Output};
use crate::server::ApiError;
use crate::wire::{BootReport, BootWaitRequest, codes};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const SYSTEMCTL: &str = "/usr/bin/systemctl";
/// One question to systemd takes milliseconds; under emulation, some hundred.
const QUESTION: Duration = Duration::from_secs(20);
/// Jobs that start after the boot (timers' first runs) have no event to wait on.
const JOBS_PAUSE: Duration = Duration::from_millis(200);

async fn systemctl(args: &[&str], deadline: Duration) -> Result<Output, ApiError> {
    let argv: Vec<&str> = [SYSTEMCTL].iter().chain(args).copied().collect();
    let failed = |e| ApiError::internal(format!("systemctl {}: {e}", args.join(" ")));
    tool::run(&argv, &[], deadline).await.map_err(failed)
}

/// The text of an answer that must not fail.
async fn ask(args: &[&str]) -> Result<String, ApiError> {
    let Output { code, text } = systemctl(args, QUESTION).await?;
    if code == 0 {
        return Ok(text);
    }
    let text = format!("systemctl {} ended with {code}: {}", args.join(" "), text.trim());
    Err(ApiError::internal(text))
}

/// `GET /boot`.
///
/// # Errors
/// systemd cannot be asked.
pub async fn report() -> Result<BootReport, ApiError> {
    let show = [
        "show",
        "-p",
        "UserspaceTimestampMonotonic",
        "-p",
        "FinishTimestampMonotonic",
        "-p",
        "NJobs",
        "-p",
        "SystemState",
    ];
    let text = ask(&show).await?;
    let values: BTreeMap<&str, &str> = text.lines().filter_map(|l| l.split_once('=')).collect();
    let number = |name: &str| values.get(name).and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
    let failed = ["list-units", "--state=failed", "--no-legend", "--plain", "--no-pager"];
    let failed_units = ask(&failed).await?;
    let userspace = number("UserspaceTimestampMonotonic");
    let finished = number("FinishTimestampMonotonic");
    let release = nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    Ok(BootReport {
        system_state: values.get("SystemState").copied().unwrap_or("unknown").to_owned(),
        pending_jobs: number("NJobs") as u32,
        failed_units: failed_units
            .lines()
            .filter_map(|l| l.split_whitespace().next())
            .map(str::to_owned)
            .collect(),
        // Monotonic time starts with the kernel, so userspace's start is the kernel's duration.
        kernel_micros: userspace,
        userspace_micros: finished.saturating_sub(userspace),
        finished_micros: finished,
        kernel_release: release,
    })
}

/// `POST /boot/wait`: returns when the boot is over and no job is left.
///
/// # Errors
/// 408 `boot_timeout`, with the state it was in.
pub async fn wait(request: &BootWaitRequest) -> Result<BootReport, ApiError> {
    let invalid = |_| {
        let text = format!("timeout_seconds {} is no time", request.timeout_seconds);
        ApiError::new(400, codes::INVALID_REQUEST, text)
    };
    let timeout = Duration::try_from_secs_f64(request.timeout_seconds).map_err(invalid)?;
    let until = Instant::now() + timeout;
    // Returns with the event of the boot's end; its exit code is the state, which is asked below.
    let waited = systemctl(&["is-system-running", "--wait"], timeout).await;
    loop {
        let report = report().await?;
        if waited.is_ok() && report.pending_jobs == 0 && report.finished_micros > 0 {
            return Ok(report);
        }
        if Instant::now() + JOBS_PAUSE > until {
            let text = format!(
                "after {timeout:?} the guest is {} with {} jobs pending",
                report.system_state, report.pending_jobs
            );
            return Err(ApiError::new(408, codes::BOOT_TIMEOUT, text));
        }
        tokio::time::sleep(JOBS_PAUSE).await;
    }
}
