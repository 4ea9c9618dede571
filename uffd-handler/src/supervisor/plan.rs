//! Turns a handshake and the service's wishes into what a page server takes.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::table::Entry;
use super::{SupervisorConfig, recovery};
use crate::control::{Attachment, Registration};
use crate::handshake::Handshake;
use crate::seal::SealError;
use crate::source::LayerFiles;
use crate::uffd::PAGE;
use crate::vm_state::{VmState, VmStateError};

/// Where a VM's memory comes from and what is to happen with it.
#[derive(Clone, Debug, Default)]
pub struct MemoryPlan {
    /// Layers of the memory, bottom first.
    pub layers: Vec<LayerFiles>,
    /// Pages to put in place ahead of demand; a missing or unusable file is ignored.
    pub working_set: Option<PathBuf>,
    /// Whether to record demand faults, for [`Supervisor::recording`](super::Supervisor::recording).
    pub record: bool,
    /// Whether to put all pages in place in the end, and how long after the start. Right only for
    /// VMs that live long: every page costs memory.
    pub graduate_after: Option<Duration>,
}

impl MemoryPlan {
    /// A memory that is one flat file.
    pub fn flat(memory: impl Into<PathBuf>, zero_map: Option<PathBuf>) -> Self {
        Self {
            layers: vec![LayerFiles::Flat { memory: memory.into(), zero_map }],
            ..Self::default()
        }
    }
}

/// Why a VM's files cannot be used.
#[derive(Debug, Error)]
pub enum PlanError {
    /// A file cannot be opened.
    #[error("{path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A key is not to be had.
    #[error(transparent)]
    Key(#[from] SealError),
    /// There is no shared state.
    #[error(transparent)]
    State(#[from] VmStateError),
}

/// Opens everything once, here: what is renamed or deleted later stays what it was for this VM.
pub(super) fn prepare(
    id: &str,
    handshake: Handshake,
    plan: &MemoryPlan,
    config: &SupervisorConfig,
) -> Result<Entry, PlanError> {
    let state_dir = config.state_dir.as_deref();
    let memory_bytes: u64 = handshake.regions.iter().map(|region| region.size).sum();
    let pages = memory_bytes / PAGE;
    let state = match state_dir.and_then(|dir| recovery::state_path(dir, id)) {
        Some(path) => VmState::create_at(&path, pages, plan.record)?,
        None => VmState::create(pages, plan.record)?,
    };
    let mut working_set = plan.working_set.clone();
    if let Some(path) = &working_set
        && let Err(error) = File::open(path)
    {
        tracing::warn!(vm = id, path = %path.display(), %error, "no working set");
        working_set = None;
    }
    let registration = Registration {
        id: id.into(),
        memory_bytes,
        regions: handshake.regions,
        peer_pid: handshake.peer_pid,
        layers: plan.layers.clone(),
        working_set,
        graduate_after_millis: plan.graduate_after.map(|after| after.as_millis() as u64),
        request: (config.request)(),
    };
    let mut fds: Vec<OwnedFd> = vec![handshake.uffd, handshake.peer.into(), state.descriptor()?];
    for attachment in registration.attachments() {
        fds.push(match attachment {
            Attachment::File(path) => File::open(path)
                .map_err(|source| PlanError::Open { path: path.to_path_buf(), source })?
                .into(),
            Attachment::Key(name) => config.keys.key(name)?.to_descriptor()?,
        });
    }
    let entry = Entry { registration, fds, state: Arc::new(state), lost: None, graduated: false };
    if let Some(dir) = state_dir {
        recovery::record(dir, &entry)
            .map_err(|source| PlanError::Open { path: dir.to_path_buf(), source })?;
    }
    Ok(entry)
}
