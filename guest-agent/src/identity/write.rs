//! Small files that hold an identity, rewritten in place.
//!
//! In place and not by rename, though a rename would be atomic: the workload is frozen while this
//! happens, one write of some ten bytes into one page is as good as atomic to anybody else, and a
//! rename on the overlay's file system costs a restore milliseconds. It also works for files that
//! something is mounted on. Settling a template makes sure that the files are on the writable
//! layer already (see [`prepare`]).

use super::proof::ItemError;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

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

/// Opens `path` for writing, which brings it to the writable layer of the root file system.
///
/// # Errors
/// It is there and cannot be opened.
pub fn prepare(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).open(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
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
