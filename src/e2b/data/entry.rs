//! A file or folder as `filesystem.EntryInfo`.

use guest_agent::wire::{DirEntry, EntryKind};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

const NANOS: i64 = 1_000_000_000;

/// The message; 64-bit numbers are strings in proto3's JSON.
pub fn info(entry: &DirEntry) -> Value {
    let mut info = json!({
        "name": entry.name,
        "type": kind(entry.kind),
        "path": entry.path,
        "size": entry.size_bytes.to_string(),
        "mode": entry.mode & 0o777,
        "permissions": permissions(entry.kind, entry.mode),
        "owner": entry.owner,
        "group": entry.group,
    });
    if let Some(time) = time(entry.modified_unix_nanos) {
        info["modifiedTime"] = time.into();
    }
    if let Some(target) = &entry.target {
        info["symlinkTarget"] = target.as_str().into();
    }
    if !entry.metadata.is_empty() {
        info["metadata"] = json!(entry.metadata);
    }
    info
}

fn kind(kind: EntryKind) -> &'static str {
    match kind {
        EntryKind::File => "FILE_TYPE_FILE",
        EntryKind::Directory => "FILE_TYPE_DIRECTORY",
        EntryKind::Symlink => "FILE_TYPE_SYMLINK",
        EntryKind::Other => "FILE_TYPE_UNSPECIFIED",
    }
}

/// With nanoseconds in full: readers of proto3's JSON take no other number of digits for granted.
fn time(unix_nanos: i64) -> Option<String> {
    let (seconds, nanos) = (unix_nanos.div_euclid(NANOS), unix_nanos.rem_euclid(NANOS));
    let text = OffsetDateTime::from_unix_timestamp(seconds).ok()?.format(&Rfc3339).ok()?;
    Some(format!("{}.{nanos:09}Z", text.strip_suffix('Z')?))
}

/// In E2B's notation: special bits and kind as letters in front, then three times `rwx`.
fn permissions(kind: EntryKind, mode: u32) -> String {
    let mut text = String::new();
    match kind {
        EntryKind::Directory => text.push('d'),
        EntryKind::Symlink => text.push('L'),
        EntryKind::File | EntryKind::Other => {}
    }
    for (bit, letter) in [(0o4000, 'u'), (0o2000, 'g'), (0o1000, 't')] {
        if mode & bit != 0 {
            text.push(letter);
        }
    }
    if text.is_empty() {
        text.push('-');
    }
    for (place, letter) in (0..9).rev().zip("rwxrwxrwx".chars()) {
        text.push(if mode & (1 << place) == 0 { '-' } else { letter });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_looks_as_the_sdks_expect() {
        let entry = DirEntry {
            name: "a".to_owned(),
            path: "/x/a".to_owned(),
            kind: EntryKind::File,
            size_bytes: 5_000_000_000,
            mode: 0o644,
            owner: "user".to_owned(),
            group: "user".to_owned(),
            modified_unix_nanos: 1_500_000_000,
            target: None,
            metadata: [("k".to_owned(), "v".to_owned())].into(),
        };
        let wanted = json!({
            "name": "a", "type": "FILE_TYPE_FILE", "path": "/x/a", "size": "5000000000",
            "mode": 0o644, "permissions": "-rw-r--r--", "owner": "user", "group": "user",
            "modifiedTime": "1970-01-01T00:00:01.500000000Z", "metadata": { "k": "v" },
        });
        assert_eq!(info(&entry), wanted);
        assert_eq!(permissions(EntryKind::Directory, 0o1777), "dtrwxrwxrwx");
        assert_eq!(permissions(EntryKind::Symlink, 0o777), "Lrwxrwxrwx");
        assert_eq!(permissions(EntryKind::File, 0o4755), "urwxr-xr-x");
    }
}
