//! Small files that hold an identity, rewritten in place.
//!
//! In place and not by rename, though a rename would be atomic: the workload is frozen while this
//! happens, one write of some ten bytes into one page is as good as atomic to anybody else, and a
//! rename on the overlay's file system costs a restore milliseconds. It also works for files that
//! something is mounted on, as it is on these (see [`prepare`]).

use super::proof::ItemError;
use crate::agent::Agent;
use nix::mount::{MsFlags, mount};
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

/// Where copies of files that have another one mounted over them are.
const COPIES: &str = "/run/rethaw/etc";
/// Bytes read at once.
const PIECE: usize = 1024;

/// Gives `path` these contents; it is made, with this mode, when it is not there.
///
/// # Errors
/// The file system refuses.
pub fn update(path: &Path, contents: &str, mode: u32) -> Result<(), ItemError> {
    rewrite(path, contents, mode).map_err(ItemError::io(format!("write {}", path.display())))
}

/// The same, with the kernel's own error.
///
/// # Errors
/// The file system refuses.
pub fn rewrite(path: &Path, contents: &str, mode: u32) -> io::Result<()> {
    let mut file = match OpenOptions::new().write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
            // Whatever the umask says.
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file
        }
        file => file?,
    };
    file.write_all_at(contents.as_bytes(), 0)?;
    // Where it ends is found without asking for all there is to know about it.
    if file.seek(SeekFrom::End(0))? != contents.len() as u64 {
        file.set_len(contents.len() as u64)?;
    }
    Ok(())
}

/// Puts a copy of `path` on `/run`, which is in memory, and mounts it over `path`, as containers do
/// with the same files: a clone then writes none of them through the overlay and its disk, which
/// is a quarter of the work of its whole identity. Where `/run` is no file system of its own, the
/// file is only brought to the writable layer. What is no plain file is left alone.
///
/// # Errors
/// It is there and cannot be copied, mounted or opened.
pub fn prepare(agent: &Agent, path: &str, mode: u32) -> io::Result<()> {
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
    let permissions = fs::Permissions::from_mode(mode);
    if !memory || fs::metadata(&run)?.dev() == meta.dev() {
        OpenOptions::new().write(true).open(&target)?;
        return fs::set_permissions(&target, permissions);
    }
    let folder = agent.path(COPIES);
    fs::create_dir_all(&folder)?;
    let copy = folder.join(target.file_name().unwrap_or_default());
    fs::copy(&target, &copy)?;
    chown(&copy, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(&copy, permissions)?;
    if meta.len() == 0 {
        // An empty file has no memory yet, which a clone would have to find.
        fs::write(&copy, "\n")?;
    }
    let none = None::<&str>;
    Ok(mount(Some(&copy), &target, none, MsFlags::MS_BIND, none)?)
}

/// Reads a small file; one that is not there reads as empty.
///
/// # Errors
/// It is there and cannot be read, or is no text.
pub fn read(path: &Path) -> Result<String, ItemError> {
    // Being read leaves no mark on it: the mark is a write, and a longer way than the reading.
    let open = || OpenOptions::new().read(true).custom_flags(libc::O_NOATIME).open(path);
    let read = || -> io::Result<String> {
        let mut file = open()?;
        let (mut text, mut piece) = (Vec::with_capacity(PIECE), [0; PIECE]);
        loop {
            match file.read(&mut piece)? {
                0 => break,
                n => text.extend_from_slice(&piece[..n]),
            }
        }
        String::from_utf8(text).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        result => result.map_err(ItemError::io(format!("read {}", path.display()))),
    }
}
