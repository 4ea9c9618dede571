//! Small files that hold an identity: replaced at once, or rewritten in place where something is
//! mounted on them.

use super::proof::ItemError;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Replaces the contents of `path`; readers see the old or the new.
///
/// # Errors
/// The file system refuses.
pub fn replace(path: &Path, contents: &str, mode: u32) -> Result<(), ItemError> {
    let io = |what: &str| ItemError::io(format!("{what} {}", path.display()));
    // A link (such as /etc/resolv.conf) stays a link.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let temporary = path.with_file_name(format!(".{name}.rethaw"));
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(contents.as_bytes())?;
        // A umask, or an older file, may have given it other permissions.
        file.set_permissions(fs::Permissions::from_mode(mode))
    };
    write().map_err(io("write"))?;
    match fs::rename(&temporary, &path) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            // Something is mounted on it: what counts is the contents of that.
            let removed = fs::remove_file(&temporary);
            fs::write(&path, contents).and(removed).map_err(io("write"))
        }
        Err(error) => Err(io("replace")(error)),
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
