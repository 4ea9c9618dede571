//! Disk space: what the store takes, and how much it may.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::Engine;

/// What the store takes on disk, files with several names counted once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Snapshots of templates and paused sandboxes.
    pub snapshots_bytes: u64,
    /// Uploaded archives.
    pub inputs_bytes: u64,
}

/// There is no room for something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the store takes {used} bytes and may take {budget}: {more} more do not fit. Delete templates or \
     paused sandboxes, or see what `rethaw gc --dry-run` finds"
)]
pub struct NoRoom {
    /// Bytes taken.
    pub used: u64,
    /// Bytes allowed.
    pub budget: u64,
    /// Bytes asked for.
    pub more: u64,
}

/// Bytes that the files below `dir` really take.
pub(super) fn allocated_bytes(dir: &Path, seen: &mut HashSet<(u64, u64)>) -> u64 {
    let mut sum = 0;
    // What goes away while it is looked at takes nothing.
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            sum += allocated_bytes(&entry.path(), seen);
        } else if seen.insert((meta.dev(), meta.ino())) {
            sum += meta.blocks() * 512;
        }
    }
    sum
}

impl Usage {
    /// Both.
    pub fn total_bytes(&self) -> u64 {
        self.snapshots_bytes + self.inputs_bytes
    }
}

impl Engine {
    /// What the store takes now.
    pub fn usage(&self) -> Usage {
        let (home, mut seen) = (&self.config.home, HashSet::new());
        let snapshots_bytes = allocated_bytes(&home.join("snapshots"), &mut seen);
        let inputs_bytes = allocated_bytes(&home.join("inputs"), &mut seen);
        Usage { snapshots_bytes, inputs_bytes }
    }

    /// How many bytes may be added; all of them without a budget.
    pub fn room(&self) -> u64 {
        let left = |budget: u64| budget.saturating_sub(self.usage().total_bytes());
        self.config.disk_budget_bytes.map_or(u64::MAX, left)
    }

    /// Refuses what would exceed the budget; with 0, when nothing at all fits any more.
    pub(super) fn require_room(&self, more: u64) -> Result<(), NoRoom> {
        let Some(budget) = self.config.disk_budget_bytes else { return Ok(()) };
        let used = self.usage().total_bytes();
        if used.saturating_add(more.max(1)) <= budget {
            return Ok(());
        }
        Err(NoRoom { used, budget, more })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_with_two_names_count_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("sub")).unwrap();
        std::fs::write(path("a"), vec![1; 8192]).unwrap();
        std::fs::hard_link(path("a"), path("sub/b")).unwrap();
        let sparse = std::fs::File::create(path("sub/c")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let bytes = allocated_bytes(dir.path(), &mut HashSet::new());
        assert!((8192..65536).contains(&bytes), "{bytes}");
    }
}
