//! The folder a Firecracker process lives in, and what is put into it.
//!
//! To Firecracker its home is `/` when it is jailed and its working folder when it is not, and every
//! path it is given is a bare file name in there. So a snapshot, which remembers those paths and
//! cannot be given others, loads in any home, jailed or not, and each clone finds its own disk under
//! the one name.
//!
//! ```text
//!   <run_dir>/jail/firecracker/<id>/root/     jailed (the jailer's own scheme)
//!   <run_dir>/fc/                             not jailed
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{AtFlags, CWD, linkat};

use super::api;
use super::cgroup::Cgroups;
use super::uids::Uid;
use crate::vmm::VmmError;

/// API socket.
pub(super) const API: &str = "api.sock";
/// vsock socket.
pub(super) const VSOCK: &str = "v.sock";
/// The page server's handshake socket, while a snapshot is loaded.
pub(super) const UFFD: &str = "uffd.sock";
/// Firecracker's own log.
pub(super) const LOG: &str = "firecracker.log";
/// Base image.
pub(super) const ROOT_DISK: &str = "root.img";
/// Writable disk.
pub(super) const SCRATCH_DISK: &str = "scratch.img";
/// Kernel.
pub(super) const KERNEL: &str = "kernel";
/// Initramfs.
pub(super) const INITRD: &str = "initrd";
/// Device state to load.
pub(super) const VMSTATE: &str = "vmstate";
/// Memory to load, with the file backend.
pub(super) const MEMORY: &str = "memory";

/// Who may write a file that is put into a home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Shared with others: nobody.
    ReadOnly,
    /// This VM's own.
    Writable,
}

/// What is special about a jailed home.
#[derive(Debug)]
pub(super) struct Jail {
    /// The VM's user and group.
    pub(super) uid: Uid,
    /// Groups the jailer made.
    pub(super) cgroups: Cgroups,
    /// Their parent.
    pub(super) cgroup_parent: String,
}

/// A home. Dropping it removes it, unless it was released.
#[derive(Debug)]
pub(super) struct Home {
    id: String,
    /// Top folder of what is removed.
    top: PathBuf,
    root: PathBuf,
    jail: Option<Jail>,
    keep: AtomicBool,
}

impl Home {
    /// Finds the paths of VM `id`'s home; makes nothing.
    pub(super) fn locate(id: &str, run_dir: &Path, binary: &Path, jail: Option<Jail>) -> Self {
        let (top, root) = if jail.is_some() {
            let top = run_dir.join("jail");
            let name = binary.file_name().unwrap_or_default();
            let root = top.join(name).join(id).join("root");
            (top, root)
        } else {
            let top = run_dir.join("fc");
            (top.clone(), top)
        };
        Self { id: id.to_owned(), top, root, jail, keep: AtomicBool::new(false) }
    }

    /// Makes the folder, in place of one that a start with the same id left when its service was
    /// killed: its sockets and links would be in the way.
    pub(super) fn create(&self) -> Result<(), VmmError> {
        self.clear().map_err(file_error("cannot remove what is left in", &self.top))?;
        std::fs::create_dir_all(&self.root).map_err(file_error("cannot make", &self.root))?;
        // The jailer gives the folder to the VM's user; the log must be there before.
        let log = self.root.join(LOG);
        File::create(&log).map_err(file_error("cannot make", &log))?;
        self.give(LOG)
    }

    /// What the jailer calls the base folder of chroots.
    pub(super) fn top(&self) -> &Path {
        &self.top
    }

    /// The folder itself.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// A file in it, as this process sees it.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The jail, if it is one.
    pub(super) fn jail(&self) -> Option<&Jail> {
        self.jail.as_ref()
    }

    /// User that Firecracker runs as.
    pub(super) fn uid(&self) -> u32 {
        self.jail.as_ref().map_or_else(|| rustix::process::getuid().as_raw(), |j| j.uid.number())
    }

    /// Makes a file of this home the VM's user's own.
    pub(super) fn give(&self, name: &str) -> Result<(), VmmError> {
        let Some(jail) = &self.jail else { return Ok(()) };
        let path = self.path(name);
        let id = Some(jail.uid.number());
        chown(&path, id, id).map_err(file_error("cannot give away", &path))
    }

    /// Puts the file `source` into the home as `name` without copying: a hard link where both are on
    /// one filesystem, a bind mount where not.
    pub(super) fn put(&self, source: &Path, name: &str, access: Access) -> Result<(), VmmError> {
        let target = self.path(name);
        let failed = file_error("cannot put into the VM's folder", source);
        let meta = source.metadata().map_err(file_error("cannot find", source))?;
        if access == Access::ReadOnly && self.jail.is_some() && meta.mode() & 0o004 == 0 {
            let text = format!("mode {:o}: the VM's user cannot read it", meta.mode() & 0o7777);
            return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, text)));
        }
        match linkat(CWD, source, CWD, &target, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::XDEV | rustix::io::Errno::PERM | rustix::io::Errno::MLINK) => {
                bind(source, &target, access).map_err(failed)?;
            }
            Err(e) => return Err(failed(e.into())),
        }
        if access == Access::Writable { self.give(name) } else { Ok(()) }
    }

    /// Copies a small file into the home.
    pub(super) fn copy(&self, source: &Path, name: &str) -> Result<(), VmmError> {
        let target = self.path(name);
        std::fs::copy(source, &target)
            .map_err(file_error("cannot copy into the VM's folder", source))?;
        // A copy of a read-only file is read-only too.
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o600))
            .map_err(file_error("cannot change", &target))?;
        self.give(name)
    }

    /// Writes a small file into the home.
    pub(super) fn write(&self, contents: &[u8], name: &str) -> Result<(), VmmError> {
        let target = self.path(name);
        let written = File::options().write(true).create_new(true).mode(0o600).open(&target);
        let written = written.and_then(|mut file| file.write_all(contents));
        written.map_err(file_error("cannot write", &target))?;
        self.give(name)
    }

    /// Listens on a socket that only the VM's user may connect to.
    pub(super) fn listen(&self, name: &str) -> Result<UnixListener, VmmError> {
        let path = self.path(name);
        let failed = file_error("cannot listen on", &path);
        let bound = api::short_path(&path).and_then(|(_dir, short)| {
            let listener = UnixListener::bind(short)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        });
        let listener = bound.map_err(failed)?;
        self.give(name)?;
        Ok(listener)
    }

    /// Removes a file of the home that need not be there.
    pub(super) fn forget(&self, name: &str) {
        let _ = std::fs::remove_file(self.path(name));
    }

    /// From now on dropping this leaves everything where it is.
    pub(super) fn release(&self) {
        self.keep.store(true, Ordering::Relaxed);
    }

    /// Undoes [`Home::release`].
    pub(super) fn retain(&self) {
        self.keep.store(false, Ordering::Relaxed);
    }

    /// Removes the folder, its mounts and the control groups. The process must be gone. Blocks.
    pub(super) fn remove(&self) {
        if self.keep.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Err(e) = self.clear() {
            tracing::error!(vm = %self.id, "cannot remove {}: {e}", self.top.display());
        }
        if let Some(jail) = &self.jail
            && let Err(e) = jail.cgroups.remove(&jail.cgroup_parent, &self.id)
        {
            tracing::error!(vm = %self.id, "cannot remove its control groups: {e}");
        }
    }
}

impl Home {
    /// Removes the folder and its mounts.
    fn clear(&self) -> io::Result<()> {
        for name in [ROOT_DISK, SCRATCH_DISK, KERNEL, INITRD, MEMORY] {
            let path = self.path(name);
            // Most are links and not mounts; unmounting one of those is an error without effect.
            let _ = umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
        match std::fs::remove_dir_all(&self.top) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.remove();
    }
}

fn bind(source: &Path, target: &Path, access: Access) -> io::Result<()> {
    File::create_new(target)?;
    let none = None::<&str>;
    mount(Some(source), target, none, MsFlags::MS_BIND, none)?;
    let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if access == Access::ReadOnly {
        flags |= MsFlags::MS_RDONLY;
    }
    Ok(mount(none, target, none, flags, none)?)
}

/// Makes [`VmmError::File`] of an I/O error.
pub(super) fn file_error(
    what: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> VmmError + use<> {
    let path = path.to_owned();
    move |source| VmmError::File { what, path, source }
}
