//! Working sets: the pages a guest touches between its restore and its first answer.
//!
//! One is recorded from the demand faults of a throw-away restore, stored beside the memory file,
//! and replayed into later clones before anybody waits for them. A stored set is a hint: a damaged
//! or foreign one is refused and the guest is merely slower.

use std::fs::File;
use std::path::Path;

use crate::bitmap::{Bitmap, words_for};
use crate::sealed_file::{self, Fields, SealedFileError};

const MAGIC: &[u8; 8] = b"RTHWWS01";
/// Largest guest memory a stored set may claim: 4 TiB.
const MAX_PAGES: u64 = 1 << 30;

/// A set of 4 KiB pages of a guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    pages: Bitmap,
}

impl WorkingSet {
    /// From a bitmap of pages.
    pub fn from_bitmap(pages: Bitmap) -> Self {
        Self { pages }
    }

    /// Size of the memory it belongs to, in pages.
    pub fn memory_pages(&self) -> u64 {
        self.pages.pages()
    }

    /// Pages in the set.
    pub fn len_pages(&self) -> u64 {
        self.pages.count()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len_pages() == 0
    }

    /// Whether a page is in it.
    pub fn contains(&self, page: u64) -> bool {
        self.pages.get(page)
    }

    /// Its ranges of consecutive pages, in order.
    pub fn runs(&self) -> impl Iterator<Item = std::ops::Range<u64>> {
        self.pages.runs()
    }

    /// Adds the pages of another recording of the same memory.
    pub fn union(&mut self, other: &Self) {
        self.pages.union(&other.pages);
    }

    /// Stores it: synced, then renamed into place.
    pub fn save(&self, path: &Path) -> Result<(), SealedFileError> {
        let mut payload = self.memory_pages().to_le_bytes().to_vec();
        for run in self.runs() {
            payload.extend_from_slice(&run.start.to_le_bytes());
            payload.extend_from_slice(&(run.end - run.start).to_le_bytes());
        }
        sealed_file::write(path, MAGIC, &payload)
    }

    /// Loads one from its file.
    pub fn load(path: &Path) -> Result<Self, SealedFileError> {
        Self::read(&File::open(path).map_err(SealedFileError::io(path))?, path)
    }

    /// Loads one from an open file; `path` is for messages.
    pub fn read(file: &File, path: &Path) -> Result<Self, SealedFileError> {
        let wrong = |reason: String| SealedFileError::contents(path, reason);
        let payload = sealed_file::read(file, path, MAGIC, 8 + MAX_PAGES * 16)?;
        let mut fields = Fields(&payload);
        let memory_pages = fields.u64().unwrap_or(0);
        if memory_pages == 0 || memory_pages > MAX_PAGES {
            return Err(wrong(format!("a memory of {memory_pages} pages")));
        }
        let mut words = vec![0; words_for(memory_pages)];
        let mut next_free = 0;
        while !fields.0.is_empty() {
            let (start, len) = (fields.u64().unwrap_or(0), fields.u64().unwrap_or(0));
            let end = start.checked_add(len).filter(|end| len > 0 && *end <= memory_pages);
            let Some(end) = end.filter(|_| start >= next_free) else {
                return Err(wrong(format!("run of {len} pages at {start} of {memory_pages}")));
            };
            for page in start..end {
                words[(page / 64) as usize] |= 1_u64 << (page % 64);
            }
            next_free = end;
        }
        Ok(Self { pages: Bitmap::from_words(memory_pages, words) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn survives_its_file(
            pages in 1_u64..5000,
            members in proptest::collection::vec(0_u64..5000, 0..200),
        ) {
            let mut bitmap = Bitmap::new(pages);
            members.iter().for_each(|page| bitmap.set(*page));
            let set = WorkingSet::from_bitmap(bitmap);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("ws");
            set.save(&path).unwrap();
            prop_assert_eq!(WorkingSet::load(&path).unwrap(), set);
        }

        #[test]
        fn a_well_sealed_lie_is_refused_or_in_bounds(
            numbers in proptest::collection::vec(any::<u64>().prop_map(|n| n >> (n % 64)), 0..9),
        ) {
            let payload: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("ws");
            // Bounded so that a big but honest memory does not cost gigabytes here.
            prop_assume!(numbers.first().is_none_or(|pages| *pages < 1 << 20 || *pages > MAX_PAGES));
            sealed_file::write(&path, MAGIC, &payload).unwrap();
            if let Ok(set) = WorkingSet::load(&path) {
                prop_assert!(set.runs().all(|run| run.end <= set.memory_pages()));
            }
        }
    }
}
