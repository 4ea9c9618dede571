//! One entry of the page server's table: a VM's registration, its descriptors and its threads.

use std::fs::File;
use std::io::PipeWriter;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use thiserror::Error;

use super::fill::{self, Unfilled};
use super::layer_cache::LayerCache;
use super::modest::become_modest;
use super::serve;
use super::session::{End, Session};
use super::spin::SpinPolicy;
use crate::control::Registration;
use crate::region::{self, RegionError, RegionMap};
use crate::seal::{Key, SealError};
use crate::source::{MemoryLayers, SourceError};
use crate::uffd::{self, PAGE, PageFd};
use crate::vm_state::{VmState, VmStateError};
use crate::working_set::WorkingSet;

/// Threads keep no more than a few small buffers on their stacks.
const STACK_BYTES: usize = 256 << 10;

/// Why a VM was not taken.
#[derive(Debug, Error)]
pub(super) enum TakeError {
    #[error("{found} descriptors came with the registration of {expected}")]
    Descriptors { expected: usize, found: usize },
    #[error("the first descriptor is not a userfaultfd")]
    NotUserfaultfd,
    #[error(transparent)]
    Regions(#[from] RegionError),
    #[error(transparent)]
    State(#[from] VmStateError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Key(#[from] SealError),
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// What a VM's threads report.
pub(super) struct Report {
    pub(super) id: String,
    /// Tells apart VMs that had the same id one after another.
    pub(super) serial: u64,
    pub(super) what: What,
}

/// See [`Report`].
pub(super) enum What {
    End(End),
    Graduated,
}

/// A VM in the table.
pub(super) struct Vm {
    pub(super) serial: u64,
    pub(super) registration: Registration,
    /// As they came, to give back to a service that starts anew.
    pub(super) fds: Vec<OwnedFd>,
    pub(super) lost: Option<String>,
    session: Arc<Session>,
    reports: Sender<Report>,
    /// Dropping it ends the threads.
    _stop: PipeWriter,
}

impl Vm {
    /// Starts serving a VM.
    pub(super) fn take(
        registration: Registration,
        fds: Vec<OwnedFd>,
        serial: u64,
        cache: &mut LayerCache,
        reports: &Sender<Report>,
        spin: SpinPolicy,
    ) -> Result<Self, TakeError> {
        let (stop, stop_writer) = std::io::pipe()?;
        let session = Arc::new(open_session(&registration, &fds, cache, stop)?);
        let (id, request) = (&registration.id, &registration.request);
        if session.state.begin_service() {
            tracing::info!(vm = id, request, "taken over");
            session.take_over();
        } else {
            tracing::info!(vm = id, request, "served");
        }
        let vm = Self {
            serial,
            registration,
            fds,
            lost: None,
            session,
            reports: reports.clone(),
            _stop: stop_writer,
        };
        let session = vm.session.clone();
        vm.start("faults", move |report| report(What::End(serve::serve(&session, spin))))?;
        if vm.session.working_set.is_some() || vm.session.graduate_after_millis.is_some() {
            vm.start_filling(fill::fill)?;
        } else {
            vm.session.state.set_prefetched();
        }
        Ok(vm)
    }

    /// Puts all pages in place, starting now.
    pub(super) fn graduate(&mut self) -> std::io::Result<()> {
        self.registration.graduate_after_millis = Some(0);
        self.start_filling(fill::graduate)
    }

    fn start_filling(
        &self,
        work: impl FnOnce(&Session) -> Result<bool, Unfilled> + Send + 'static,
    ) -> std::io::Result<()> {
        let session = self.session.clone();
        self.start("fill", move |report| {
            // Claims of other VMs come first, and so does demand of this one.
            become_modest();
            match work(&session) {
                Ok(true) => report(What::Graduated),
                Ok(false) | Err(Unfilled::Over) => {}
                Err(Unfilled::Failed(reason)) => {
                    tracing::warn!(vm = session.id, reason, "not all pages put in place");
                }
            }
        })
    }

    /// Starts one of the VM's threads, which is given a way to report.
    fn start(
        &self,
        name: &str,
        work: impl FnOnce(&dyn Fn(What)) + Send + 'static,
    ) -> std::io::Result<()> {
        let (id, serial, reports) = (self.session.id.clone(), self.serial, self.reports.clone());
        let report = move |what| {
            // Fails when the main thread has ended, and the process with it.
            let _ = reports.send(Report { id: id.clone(), serial, what });
        };
        let thread = std::thread::Builder::new().name(name.into()).stack_size(STACK_BYTES);
        thread.spawn(move || work(&report)).map(drop)
    }
}

fn open_session(
    registration: &Registration,
    fds: &[OwnedFd],
    cache: &mut LayerCache,
    stop: std::io::PipeReader,
) -> Result<Session, TakeError> {
    let expected = registration.fd_count();
    if fds.len() != expected {
        return Err(TakeError::Descriptors { expected, found: fds.len() });
    }
    let memory_bytes = registration.memory_bytes;
    let regions = region::validate(registration.regions.clone(), memory_bytes)?;
    let mut copies = fds.iter().map(OwnedFd::try_clone);
    let mut next = || copies.next().unwrap_or_else(|| Err(std::io::ErrorKind::NotFound.into()));
    let fd = next()?;
    if !uffd::is_userfaultfd(fd.as_fd()) {
        return Err(TakeError::NotUserfaultfd);
    }
    let peer = next()?;
    let state = VmState::open(next()?, memory_bytes / PAGE)?;
    let mut layers = Vec::new();
    for layer in &registration.layers {
        let files: Result<Vec<File>, _> =
            layer.paths().iter().map(|_| next().map(File::from)).collect();
        let files = files?;
        let key = match layer.key() {
            Some(_) => Some(Key::from_descriptor(next()?.as_fd())?),
            None => None,
        };
        layers.push(cache.get(layer, files, key.as_ref(), memory_bytes)?);
    }
    let working_set = match &registration.working_set {
        Some(path) => {
            let read = WorkingSet::read(&File::from(next()?), path);
            usable(read.map_err(|error| error.to_string()), memory_bytes / PAGE)
        }
        None => None,
    };
    Ok(Session::new(
        registration.id.clone(),
        PageFd::new(fd),
        peer,
        RegionMap::new(regions),
        state,
        MemoryLayers::new(layers)?,
        working_set,
        registration.graduate_after_millis,
        stop,
    ))
}

/// A working set is a hint: a bad one costs time, never a VM.
fn usable(read: Result<WorkingSet, String>, pages: u64) -> Option<WorkingSet> {
    match read {
        Ok(set) if set.memory_pages() == pages => return Some(set),
        Ok(set) => tracing::warn!(
            memory_pages = pages,
            set_for_pages = set.memory_pages(),
            "working set of another memory ignored"
        ),
        Err(reason) => tracing::warn!(reason, "working set ignored"),
    }
    None
}
