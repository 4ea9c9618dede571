//! What a new service needs when service and page server were both killed.
//!
//! Each VM has two files in the state directory: its shared state itself, and a record of its
//! registration. The VMM still holds the userfaultfd, which is copied out of it; its process handle
//! stands in for the handshake socket. A VM that cannot be recovered is reported lost, never
//! forgotten: it stands still and somebody has to kill it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::poll::PollFlags;
use serde::{Deserialize, Serialize};

use super::table::Entry;
use crate::control::{Attachment, Registration};
use crate::seal::KeySource;
use crate::source::Fingerprint;
use crate::uffd::PAGE;
use crate::vm_state::VmState;
use crate::{fdpass, pidfd};

#[derive(Serialize, Deserialize)]
struct Record {
    registration: Registration,
    /// When the VMM started, in clock ticks after boot: with the process id, one process only.
    started: u64,
    /// The layers' files as they were.
    files: Vec<Fingerprint>,
}

/// A VM that was found, or what is known of one that could not be recovered.
pub(super) enum Recovered {
    Vm(Box<Entry>),
    Lost {
        id: String,
        reason: String,
    },
    /// Its VMM has ended meanwhile.
    Gone(String),
}

/// Where a VM's shared state lies. Names that do not make a file name have none.
pub(super) fn state_path(dir: &Path, id: &str) -> Option<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    (!id.is_empty() && id.len() <= 100 && id.chars().all(plain))
        .then(|| dir.join(format!("{id}.state")))
}

/// Writes down a VM. Not synced: only the death of processes has to be survived.
pub(super) fn record(dir: &Path, entry: &Entry) -> std::io::Result<()> {
    let registration = entry.registration.clone();
    let Some(path) = state_path(dir, &registration.id) else { return Ok(()) };
    let started = start_time(registration.peer_pid)?;
    let attached = registration.attachments().zip(&entry.fds[Registration::FIXED_FDS..]);
    // Keys are not written down anywhere.
    let files = attached.filter(|(attachment, _)| matches!(attachment, Attachment::File(_)));
    let files: std::io::Result<_> =
        files.map(|(_, fd)| Fingerprint::of(&File::from(fd.try_clone()?))).collect();
    let text = serde_json::to_vec(&Record { registration, started, files: files? })?;
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, path.with_extension("json"))
}

/// Removes what was written about a VM.
pub(super) fn forget(dir: &Path, id: &str) {
    let Some(path) = state_path(dir, id) else { return };
    for file in [path.with_extension("json"), path] {
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %file.display(), %error, "removing a VM's record");
            }
            _ => {}
        }
    }
}

/// All VMs that were written down, but for those that are known.
pub(super) fn recover_all(
    dir: &Path,
    known: &[String],
    keys: &dyn KeySource,
) -> std::io::Result<Vec<Recovered>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json")
            && let Some(id) = path.file_stem().and_then(|stem| stem.to_str())
            && !known.iter().any(|known| known == id)
        {
            all.push(recover(&path, id, keys));
        }
    }
    Ok(all)
}

fn recover(path: &Path, id: &str, keys: &dyn KeySource) -> Recovered {
    let lost = |reason: String| Recovered::Lost { id: id.into(), reason };
    let record: Record = match std::fs::read(path).map(|text| serde_json::from_slice(&text)) {
        Ok(Ok(record)) => record,
        Ok(Err(error)) => return lost(format!("{}: {error}", path.display())),
        Err(error) => return lost(format!("{}: {error}", path.display())),
    };
    let pid = record.registration.peer_pid;
    // The handle first: whatever the start time is then, it is that of the handle's process.
    let Ok(vmm) = pidfd::open(pid) else { return Recovered::Gone(id.into()) };
    // One that has ended and was not reaped yet still has a handle, which is readable.
    let ended = fdpass::wait_for(vmm.as_fd(), PollFlags::POLLIN, Instant::now()) != Ok(false);
    if ended || start_time(pid).ok() != Some(record.started) {
        return Recovered::Gone(id.into());
    }
    match rebuild(record, vmm, &path.with_extension("state"), keys) {
        Ok(entry) => Recovered::Vm(Box::new(entry)),
        Err(error) => lost(format!("page server and service were killed: {error}")),
    }
}

fn rebuild(
    record: Record,
    vmm: OwnedFd,
    state: &Path,
    keys: &dyn KeySource,
) -> Result<Entry, String> {
    let Record { registration, files, .. } = record;
    let text = |error: std::io::Error| error.to_string();
    let uffd = find_userfaultfd(&vmm, registration.peer_pid)?;
    let file = File::options().read(true).write(true).open(state).map_err(text)?;
    let state = VmState::open(file.into(), registration.memory_bytes / PAGE)
        .map_err(|error| error.to_string())?;
    let mut fds = vec![uffd, vmm, state.descriptor().map_err(|error| error.to_string())?];
    let mut fingerprints = files.iter();
    for attachment in registration.attachments() {
        fds.push(match attachment {
            Attachment::File(path) => {
                let text = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
                let file = File::open(path).map_err(|e| text(&e))?;
                let was = fingerprints.next().ok_or_else(|| text(&"not in the record"))?;
                was.check(&file, path).map_err(|e| e.to_string())?;
                file.into()
            }
            Attachment::Key(id) => {
                let key = keys.key(id).and_then(|key| key.to_descriptor());
                key.map_err(|e| e.to_string())?
            }
        });
    }
    let graduated = state.is_graduated();
    Ok(Entry { registration, fds, state: Arc::new(state), lost: None, graduated })
}

/// Copies the one userfaultfd out of the VMM.
fn find_userfaultfd(vmm: &OwnedFd, pid: i32) -> Result<OwnedFd, String> {
    let mut found = Vec::new();
    let descriptors =
        std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(|error| error.to_string())?;
    for descriptor in descriptors.flatten() {
        let is_one = std::fs::read_link(descriptor.path())
            .is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]");
        if is_one && let Some(number) = descriptor.file_name().to_str().and_then(|n| n.parse().ok())
        {
            found.push(number);
        }
    }
    match found[..] {
        [number] => {
            pidfd::get_fd(vmm.as_fd(), number).map_err(|error| format!("pidfd_getfd: {error}"))
        }
        _ => Err(format!("the VMM (pid {pid}) has {} userfaultfds", found.len())),
    }
}

/// Field 22 of /proc/pid/stat; the command's name before it may contain anything.
fn start_time(pid: i32) -> std::io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(19))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| std::io::Error::other(format!("no start time of process {pid}")))
}
