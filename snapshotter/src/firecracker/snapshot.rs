//! From a paused VM to files in a directory.
//!
//! A booted VM gives a full memory file. A restored one gives what changed since it was loaded:
//! Firecracker writes those pages into an otherwise empty sparse file, which is turned into a delta
//! layer here. Firecracker forgets what it has written, so a second snapshot of the same VM holds
//! only what changed after the first; it is merged into the same sparse file (by Firecracker, which
//! does that when the file is there), and so that file stays in the VM's home.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{SeekFrom, ftruncate, seek};
use uffd_handler::seal::Key;
use uffd_handler::source::DeltaWriter;

use super::api::{SnapshotCreate, SnapshotType};
use super::home::file_error;
use super::vm::Origin;
use crate::vmm::{SnapshotFiles, VmmError, write_vmstate};
use crate::{disk, manifest};

const STATE: &str = "snapshot.vmstate";
const MEMORY: &str = "snapshot.memory";
const CHANGES: &str = "changes.memory";

const PAGE: u64 = 4096;

/// What one snapshot will be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    origin: Origin,
    memory_bytes: u64,
}

impl Plan {
    pub(super) fn new(origin: Origin, memory_bytes: u64) -> Self {
        Self { origin, memory_bytes }
    }

    /// What Firecracker is asked for.
    pub(super) fn request(&self) -> SnapshotCreate {
        let (snapshot_type, memory) = match self.origin {
            Origin::Booted => (SnapshotType::Full, MEMORY),
            Origin::Restored => (SnapshotType::Diff, CHANGES),
        };
        SnapshotCreate {
            snapshot_type,
            snapshot_path: STATE.to_owned(),
            mem_file_path: memory.to_owned(),
        }
    }

    /// Firecracker writes all of memory and syncs it: slow disks do 32 MiB a second.
    pub(super) fn deadline(&self) -> Duration {
        Duration::from_secs(30 + self.memory_bytes / (32 << 20))
    }
}

/// Takes what Firecracker wrote in its home to `into`.
pub(super) async fn collect(
    plan: Plan,
    home: &Path,
    into: &Path,
    key: Option<Key>,
) -> Result<SnapshotFiles, VmmError> {
    let (home, into) = (home.to_owned(), into.to_owned());
    let work = {
        let into = into.clone();
        move || collect_blocking(plan, &home, &into, key.as_ref())
    };
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(file_error("cannot collect into", &into)(io::Error::other(e))))
}

fn collect_blocking(
    plan: Plan,
    home: &Path,
    into: &Path,
    key: Option<&Key>,
) -> Result<SnapshotFiles, VmmError> {
    let vmstate = into.join(manifest::VMSTATE);
    let written = home.join(STATE);
    match key {
        None => take(&written, &vmstate)?,
        Some(key) => {
            let state = std::fs::read(&written).map_err(file_error("cannot read", &written))?;
            write_vmstate(&vmstate, &state, Some(key))?;
            std::fs::remove_file(&written).map_err(file_error("cannot remove", &written))?;
        }
    }
    let (memory, delta, delta_digest) = (None, None, None);
    let mut files = SnapshotFiles { vmstate, memory, delta, delta_digest, phases: Vec::new() };
    match plan.origin {
        Origin::Booted => {
            let memory = into.join(manifest::MEMORY);
            take(&home.join(MEMORY), &memory)?;
            files.memory = Some(memory);
        }
        Origin::Restored => {
            let changes = home.join(CHANGES);
            check_granularity(home)?;
            let delta = into.join(manifest::DELTA);
            files.delta_digest = Some(write_delta(&changes, &delta, plan.memory_bytes, key)?);
            files.delta = Some(delta);
        }
    }
    Ok(files)
}

/// Moves a file out of the home and gives it to the service.
fn take(from: &Path, to: &Path) -> Result<(), VmmError> {
    match std::fs::rename(from, to) {
        Err(e) if e.kind() == io::ErrorKind::CrossesDevices => {
            disk::clone_file(from, to).map_err(file_error("cannot copy", from))?;
            std::fs::remove_file(from).map_err(file_error("cannot remove", from))?;
            let file = File::open(to).map_err(file_error("cannot open", to))?;
            file.sync_all().map_err(file_error("cannot sync", to))?;
        }
        other => other.map_err(file_error("cannot move", from))?,
    }
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    chown(to, Some(uid), Some(gid)).map_err(file_error("cannot take", to))?;
    // Jailed VMs of other users map it.
    let mode = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(to, mode).map_err(file_error("cannot change", to))
}

/// Where the pages of a delta are indexed, beside its data.
pub(super) fn index_of(delta: &Path) -> PathBuf {
    let mut name = delta.as_os_str().to_owned();
    name.push(".index");
    name.into()
}

fn write_delta(
    changes: &Path,
    delta: &Path,
    memory_bytes: u64,
    key: Option<&Key>,
) -> Result<[u8; 32], VmmError> {
    let failed = || file_error("cannot read", changes);
    let file = File::open(changes).map_err(failed())?;
    let length = file.metadata().map_err(failed())?.size();
    if length != memory_bytes {
        let text = format!("{length} bytes of changes for {memory_bytes} bytes of memory");
        return Err(failed()(io::Error::new(io::ErrorKind::InvalidData, text)));
    }
    let delta_failed = |e: uffd_handler::sealed_file::SealedFileError| {
        file_error("cannot write", delta)(io::Error::other(e.to_string()))
    };
    let writer = DeltaWriter::create_with(delta, &index_of(delta), memory_bytes / PAGE, key);
    let mut writer = writer.map_err(delta_failed)?;
    let mut wrong = None;
    let mut buffer = vec![0_u8; 256 * PAGE as usize];
    let copied = disk::for_each_extent(&file, length, |start, end| {
        let mut at = start;
        while at < end {
            let n = buffer.len().min((end - at) as usize);
            file.read_exact_at(&mut buffer[..n], at)?;
            for (i, page) in buffer[..n].chunks(PAGE as usize).enumerate() {
                if let Err(e) = writer.page(at / PAGE + i as u64, page) {
                    wrong = Some(e);
                    return Err(io::ErrorKind::Other.into());
                }
            }
            at += n as u64;
        }
        Ok(())
    });
    if let Some(e) = wrong {
        return Err(delta_failed(e));
    }
    copied.map_err(failed())?;
    Ok(writer.finish().map_err(delta_failed)?.digest)
}

/// Which pages changed is read off the holes of a file, so the filesystem must keep holes of single
/// pages: one that rounded up would make zeros of pages that never changed.
fn check_granularity(dir: &Path) -> Result<(), VmmError> {
    let path = dir.join(".holes");
    let probe = || -> io::Result<bool> {
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
        ftruncate(&file, 64 * PAGE)?;
        file.write_all_at(&[1; PAGE as usize], 33 * PAGE)?;
        file.sync_data()?;
        let start = seek(&file, SeekFrom::Data(0))?;
        let end = seek(&file, SeekFrom::Hole(start))?;
        Ok((start, end) == (33 * PAGE, 34 * PAGE))
    };
    let fine = probe();
    let _ = std::fs::remove_file(&path);
    if fine.map_err(file_error("cannot probe for holes in", dir))? {
        return Ok(());
    }
    Err(VmmError::Unsupported(format!(
        "the filesystem of {} does not keep holes of {PAGE} bytes, which snapshots of restored \
         Firecracker VMs need",
        dir.display()
    )))
}
