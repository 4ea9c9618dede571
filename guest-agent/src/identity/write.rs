//! Small files that hold an identity, rewritten in place.
//!
//! In place and not by rename, though a rename would be atomic: the workload is frozen while this
//! happens, one write of some ten bytes into one page is as good as atomic to anybody else, and a
//! rename on the overlay's file system costs a restore milliseconds. It also works for files that
//! something is mounted on, as it is on these (see [`prepare`]).

use super::proof::ItemError;
use crate::agent::Agent;
use nix::mount::{MsFlags, mount};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

/// Where copies of files that have another one mounted over them are.
const COPIES: &str = "/run/rethaw/etc";

fn open(path: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(mode).open(path)
}

/// Gives `path` these contents; it is made when it is not there.
///
/// # Errors
/// The file system refuses.
pub fn update(path: &Path, contents: &str, mode: u32) -> Result<(), ItemError> {
    let write = || -> io::Result<()> {
        let file = open(path, mode)?;
        file.write_all_at(contents.as_bytes(), 0)?;
        let meta = file.metadata()?;
        if meta.len() != contents.len() as u64 {
            file.set_len(contents.len() as u64)?;
        }
        if meta.permissions().mode() & 0o7777 != mode {
            file.set_permissions(fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    };
    write().map_err(ItemError::io(format!("write {}", path.display())))
}

/// Puts a copy of `path` on `/run`, which is in memory, and mounts it over `path`, as containers do
/// with the same files: a clone then writes none of them through the overlay and its disk, which
/// is a quarter of the work of its whole identity. Where `/run` is no file system of its own, the
/// file is only brought to the writable layer. What is no plain file is left alone.
///
/// # Errors
/// It is there and cannot be copied, mounted or opened.
pub fn prepare(agent: &Agent, path: &str) -> io::Result<()> {
    let target = agent.path(path);
    let meta = match fs::symlink_metadata(&target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    let run = agent.path("/run");
    let root = fs::metadata(agent.root())?.dev();
    let memory = fs::metadata(&run).is_ok_and(|m| m.dev() != root);
    if !meta.is_file() {
        return Ok(());
    }
    if !memory {
        return OpenOptions::new().write(true).open(&target).map(drop);
    }
    if fs::metadata(&run)?.dev() == meta.dev() {
        return Ok(());
    }
    let folder = agent.path(COPIES);
    fs::create_dir_all(&folder)?;
    let copy = folder.join(target.file_name().unwrap_or_default());
    fs::copy(&target, &copy)?;
    chown(&copy, Some(meta.uid()), Some(meta.gid()))?;
    let none = None::<&str>;
    Ok(mount(Some(&copy), &target, none, MsFlags::MS_BIND, none)?)
}

/// Reads a small file; one that is not there reads as empty.
///
/// # Errors
/// It is there and cannot be read.
pub fn read(path: &Path) -> Result<String, ItemError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(ItemError::io(format!("read {}", path.display()))(error)),
    }
}
