//! What is there: one entry, or a folder's.

use crate::wire::{DirEntry, EntryKind};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Describes one entry; a link is not followed.
///
/// # Errors
/// It is not there.
pub fn entry(path: &Path) -> io::Result<DirEntry> {
    let meta = fs::symlink_metadata(path)?;
    let kind = match meta.file_type() {
        t if t.is_file() => EntryKind::File,
        t if t.is_dir() => EntryKind::Directory,
        t if t.is_symlink() => EntryKind::Symlink,
        _ => EntryKind::Other,
    };
    let target = match kind {
        EntryKind::Symlink => Some(fs::read_link(path)?.to_string_lossy().into_owned()),
        _ => None,
    };
    Ok(DirEntry {
        name: path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
        path: path.to_string_lossy().into_owned(),
        kind,
        size_bytes: meta.size(),
        mode: meta.mode() & 0o7777,
        owner: owner("/etc/passwd", meta.uid()),
        group: owner("/etc/group", meta.gid()),
        modified_unix_nanos: meta.mtime().saturating_mul(1_000_000_000) + meta.mtime_nsec(),
        target,
        // A link has none of its own, and its target's would be misleading.
        metadata: if kind == EntryKind::File {
            super::metadata::read(path)
        } else {
            Default::default()
        },
    })
}

/// Name of a user or group; both files have the number in their third field.
fn owner(file: &str, id: u32) -> String {
    if id == 0 {
        return "root".to_owned();
    }
    let number = id.to_string();
    let text = fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find(|l| l.split(':').nth(2) == Some(&number));
    line.and_then(|l| l.split(':').next()).map_or(number.clone(), str::to_owned)
}
