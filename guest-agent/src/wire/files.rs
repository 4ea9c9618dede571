//! Files and folders: listing, status, moving, watching. Contents travel as raw bytes.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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
    /// What its uploader noted about it, kept in extended attributes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
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

/// A line of `GET /watch?path=&recursive=&entries=&network=`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchEvent {
    /// Path under the watched folder; empty for the folder itself.
    pub name: String,
    /// What happened.
    pub kind: WatchKind,
    /// The entry as it is now, where it was asked for and is there still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<DirEntry>,
}

/// Body of `POST /watchers`: what is to be watched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchRequest {
    /// The folder.
    pub path: String,
    /// Folders below it as well.
    #[serde(default)]
    pub recursive: bool,
    /// Describe each entry with its event.
    #[serde(default)]
    pub entries: bool,
    /// Watch it even if it is on a network file system, whose changes may go unseen.
    #[serde(default)]
    pub network: bool,
}

/// Answer to `POST /watchers`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatcherId {
    /// Names the watcher in `/watchers/{id}`.
    pub id: String,
}

/// Answer to `GET /watchers/{id}`: what happened since it was last asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchEvents {
    /// The events, oldest first.
    pub items: Vec<WatchEvent>,
}

/// Answer to `GET /user?name=`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserInfo {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Home directory.
    pub home: String,
}

/// Answer to `GET /usage`: what the machine is using now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Processors.
    pub cpu_count: u32,
    /// Busy share of all processors since this was last asked, in percent.
    pub cpu_used_percent: f64,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// Memory that programs could not have now.
    pub memory_used_bytes: u64,
    /// Memory that holds copies of files.
    pub memory_cache_bytes: u64,
    /// Size of the root file system.
    pub disk_bytes: u64,
    /// What of it is in use.
    pub disk_used_bytes: u64,
}
