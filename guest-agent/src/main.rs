//! The guest agent: serves the host over the virtio-serial port and vsock. As process 1 it
//! prepares the root file system first and becomes systemd.

mod preinit;

use guest_agent::agent::{Agent, Config};
use guest_agent::transport::{Port, VsockListener, find_port, serve_session, serve_vsock};
use guest_agent::wire::AgentState;
use guest_agent::{keep_heap, start_journald};
use std::io;
use std::process::ExitCode;
use std::rc::Rc;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        preinit::run();
    }
    run_before_others();
    keep_heap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.and_then(|runtime| {
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, serve())
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rethaw-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Puts this thread ahead of what its own work wakes: a new clock makes systemd and every timer look
/// again, a thaw lets the whole workload run, and the host waits for the answer meanwhile. Children
/// start with the ordinary policy. Without the right to do this the agent is only slower.
fn run_before_others() {
    let parameters = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the call reads one struct, which lives until it returns.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
}

async fn serve() -> io::Result<()> {
    let agent = Rc::new(Agent::new(Config::default()));
    // What an agent before this one was about to do.
    if agent.state() == AgentState::Live {
        start_journald(&agent)?;
    }
    let vsock = VsockListener::bind()?;
    let port = find_port().and_then(|path| Port::open(&path));
    match (port, vsock) {
        (Ok(port), None) => serve_session(port, agent, true).await,
        (Ok(port), Some(vsock)) => {
            tokio::task::spawn_local(serve_vsock(vsock, Rc::clone(&agent)));
            serve_session(port, agent, true).await
        }
        (Err(_), Some(vsock)) => serve_vsock(vsock, agent).await,
        (Err(error), None) => Err(error),
    }
}
