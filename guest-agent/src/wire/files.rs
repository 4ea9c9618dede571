//! Files and folders: listing, status, moving, watching. Contents travel as raw bytes.

use serde::{Deserialize, Serialize};

/// Kind of a directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// Regular file.
    File,
    /// Folder.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Device, socket or pipe.
    Other,
}

/// Answer to `GET /stat`, and one line of `GET /dir`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirEntry {
    /// Last part of the path.
    pub name: String,
    /// Absolute path.
    pub path: String,
    /// Kind of the entry itself; a link is not followed.
    pub kind: EntryKind,
    /// Size of the file.
    pub size_bytes: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner's name, or number where it has none.
    pub owner: String,
    /// Group's name, or number where it has none.
    pub group: String,
    /// Last change, nanoseconds since 1970.
    pub modified_unix_nanos: i64,
    /// Where a symbolic link points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// Answer to `GET /dir?path=&depth=`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirEntries {
    /// The entries, by path.
    pub items: Vec<DirEntry>,
}

/// Body of `POST /dir`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MkdirRequest {
    /// Folder to make, with its parents.
    pub path: String,
    /// Owner of what is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Body of `POST /move`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveRequest {
    /// What is moved.
    pub from: String,
    /// Where it is to be; replaced when it exists.
    pub to: String,
    /// Owner of parents that have to be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// What happened to a watched entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WatchKind {
    /// Made, or moved here.
    Create,
    /// Contents changed.
    Write,
    /// Removed.
    Remove,
    /// Moved away.
    Rename,
    /// Owner or permissions changed.
    Chmod,
    /// Events were lost: look again.
    Overflow,
}

/// A line of `GET /watch?path=&recursive=`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchEvent {
    /// Path under the watched folder; empty for the folder itself.
    pub name: String,
    /// What happened.
    pub kind: WatchKind,
}
