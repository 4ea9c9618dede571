//! Running a system tool for the agent itself and taking its output. Only where a template is
//! made; restores and claims start no process.

use super::reap;
use super::spawn::{self, Plan};
use super::streams;
use std::ffi::CString;
use std::io;
use std::time::Duration;
use tokio::io::Interest;

/// Output that is kept.
const MAX_OUTPUT: usize = 256 * 1024;

/// What a tool said.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code.
    pub code: i32,
    /// Standard output and error, as they came.
    pub text: String,
}

/// Runs `argv` (an absolute path first), outside the workload.
///
/// # Errors
/// It cannot be started, or does not end in time; it is killed then.
pub async fn run(
    argv: &[&str],
    env: &[(String, String)],
    deadline: Duration,
) -> io::Result<Output> {
    let c = |text: &str| CString::new(text).map_err(|_| io::ErrorKind::InvalidInput.into());
    let argv = argv.iter().map(|a| c(a)).collect::<io::Result<Vec<_>>>()?;
    let program = argv.first().cloned().ok_or(io::ErrorKind::InvalidInput)?;
    let base = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C"];
    let mut strings = base.iter().map(|e| c(e)).collect::<io::Result<Vec<_>>>()?;
    for (name, value) in env {
        strings.push(c(&format!("{name}={value}"))?);
    }
    let plan = Plan {
        candidates: vec![program],
        argv,
        env: strings,
        cwd: c("/")?,
        uid: 0,
        gid: 0,
        groups: vec![0],
        terminal: false,
    };
    let (ends, child_ends) = streams::pipes(false)?;
    let child = spawn::spawn(&plan, child_ends.borrow(), None).map_err(io::Error::other)?;
    drop(child_ends);
    let pidfd = crate::watch::watch(child.pidfd, Interest::READABLE)?;
    let collect = async {
        let mut text = Vec::new();
        let mut take = |data: &[u8]| {
            let room = MAX_OUTPUT.saturating_sub(text.len());
            text.extend_from_slice(&data[..data.len().min(room)]);
            !data.is_empty()
        };
        let mut open = (true, ends.stderr.is_some());
        while open.0 || open.1 {
            let stderr = ends.stderr.as_ref().unwrap_or(&ends.stdout);
            tokio::select! {
                // Each branch is a read of its own: the buffer is used only once it has data.
                ready = ends.stdout.readable(), if open.0 => {
                    drop(ready);
                    open.0 = streams::read(&ends.stdout, &mut take).await?;
                }
                ready = stderr.readable(), if open.1 => {
                    drop(ready);
                    open.1 = streams::read(stderr, &mut take).await?;
                }
            }
        }
        loop {
            let mut ready = pidfd.readable().await?;
            if let Some(ended) = reap::wait(pidfd.get_ref(), libc::WNOHANG) {
                let text = String::from_utf8_lossy(&text).into_owned();
                return Ok(Output { code: ended.code, text });
            }
            ready.clear_ready();
        }
    };
    let result = tokio::time::timeout(deadline, collect).await;
    result.unwrap_or_else(|_| {
        // Its group is its own, made before it ran.
        let group = nix::unistd::Pid::from_raw(child.pid);
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        reap::wait(pidfd.get_ref(), 0);
        let text = format!("{:?} did not end within {deadline:?}", plan.argv);
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    })
}
