//! Making the guest hold still: for good before a template snapshot, for a while before a pause.

use crate::agent::Agent;
use crate::clock::Instant;
use crate::server::ApiError;
use crate::wire::{AgentState, FreezeRequest, SettleReport, SettleRequest, codes};
use std::fs;
use std::io;
use std::path::Path;

/// State that would be the same in every clone, or tells of the template's making.
const SHARED_STATE: &[&str] =
    &["/var/lib/systemd/random-seed", "/var/lib/systemd/credential.secret"];
/// Folders whose contents a template does without.
const VACUUM: &[&str] = &["/var/cache/apt/archives", "/var/lib/apt/lists", "/tmp", "/var/tmp"];

/// `POST /settle`: removes shared state, writes everything to the disk and freezes the workload.
/// From here on only an identity makes the machine usable.
///
/// # Errors
/// 409 unless live; a file that cannot be removed, or a workload that cannot be frozen.
pub fn settle(agent: &Agent, request: &SettleRequest) -> Result<SettleReport, ApiError> {
    let started = Instant::now()?;
    require_live(agent, "settled")?;
    // To the end the runtime gets no turn: no command can start in between. The workload stops first:
    // it must not write what was just removed.
    if agent.workload.is_available() {
        agent.workload.freeze().map_err(|e| thawed(agent, e.into()))?;
    }
    let mut removed = Vec::new();
    for path in SHARED_STATE {
        match fs::remove_file(agent.path(path)) {
            Ok(()) => removed.push((*path).to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(thawed(agent, ApiError::from_io(&error, path))),
        }
    }
    if request.vacuum {
        for path in VACUUM {
            vacuum(&agent.path(path), &mut removed);
        }
    }
    crate::identity::prepare(agent, request.vacuum, &mut removed).map_err(|e| thawed(agent, e))?;
    agent.log.clear();
    agent.env.borrow_mut().clear();
    agent.generation.borrow_mut().take();
    crate::resident::populate();
    nix::unistd::sync();
    if request.drop_caches {
        let dropped = fs::write("/proc/sys/vm/drop_caches", "3");
        dropped.map_err(|e| thawed(agent, ApiError::from_io(&e, "drop_caches")))?;
    }
    agent.set_state(AgentState::Settled).map_err(|e| thawed(agent, e.into()))?;
    Ok(SettleReport {
        state: agent.state(),
        removed,
        frozen_processes: agent.workload.processes(),
        total_micros: started.micros(),
    })
}

/// `POST /freeze`: stops the workload so that memory and disk belong to one instant.
///
/// # Errors
/// 409 unless live; a workload that cannot be frozen.
pub fn freeze(agent: &Agent, request: &FreezeRequest) -> Result<SettleReport, ApiError> {
    let started = Instant::now()?;
    require_live(agent, "frozen")?;
    agent.workload.freeze().map_err(|e| thawed(agent, e.into()))?;
    crate::identity::prepare_copy(agent);
    crate::identity::prepare_attachment(agent);
    if request.sync {
        nix::unistd::sync();
    }
    agent.set_state(AgentState::Frozen).map_err(|e| thawed(agent, e.into()))?;
    Ok(SettleReport {
        state: agent.state(),
        removed: Vec::new(),
        frozen_processes: agent.workload.processes(),
        total_micros: started.micros(),
    })
}

fn require_live(agent: &Agent, what: &str) -> Result<(), ApiError> {
    if agent.state() == AgentState::Live {
        return Ok(());
    }
    let text = format!("a machine that is {:?} cannot be {what}", agent.state());
    Err(ApiError::new(409, codes::WRONG_STATE, text))
}

/// A settle that fails leaves the machine as live as it was.
fn thawed(agent: &Agent, error: ApiError) -> ApiError {
    if agent.workload.is_available()
        && let Err(also) = agent.workload.thaw()
    {
        return ApiError::internal(format!("{error}; and the workload stays frozen: {also}"));
    }
    error
}

/// Empties a folder as far as possible: a file in use by the system is no reason to fail.
fn vacuum(dir: &Path, removed: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        // systemd's private folders belong to services that run.
        if entry.file_name().to_string_lossy().starts_with("systemd-private-") {
            continue;
        }
        let result = match entry.file_type() {
            Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
            _ => fs::remove_file(&path),
        };
        if result.is_ok() {
            removed.push(path.to_string_lossy().into_owned());
        }
    }
}
