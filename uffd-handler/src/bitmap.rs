//! Bitmaps over the 4 KiB pages of a guest's memory: a plain one, and a view of atomic words that
//! lie in memory shared between processes.

use std::sync::atomic::{AtomicU64, Ordering};

/// Words that a bitmap of `pages` bits needs.
pub const fn words_for(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

/// A set of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    pages: u64,
    words: Vec<u64>,
}

impl Bitmap {
    /// An empty set out of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self { pages, words: vec![0; words_for(pages)] }
    }

    /// From words as [`Bitmap::words`] gives them; bits beyond the last page are dropped.
    pub fn from_words(pages: u64, mut words: Vec<u64>) -> Self {
        words.resize(words_for(pages), 0);
        if !pages.is_multiple_of(64)
            && let Some(last) = words.last_mut()
        {
            *last &= (1 << (pages % 64)) - 1;
        }
        Self { pages, words }
    }

    /// Size of the memory, in pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The bits, page 0 in the lowest bit of the first word.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether the page is in the set; no page beyond the memory is.
    pub fn get(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// Adds a page; pages beyond the memory are ignored.
    pub fn set(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Adds every page of another set over the same memory.
    pub fn union(&mut self, other: &Self) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// First page at or after `from` whose membership is `member`.
    pub fn next(&self, from: u64, member: bool) -> Option<u64> {
        let mut page = from;
        while page < self.pages {
            let word = self.words[(page / 64) as usize];
            let rest = (if member { word } else { !word }) >> (page % 64);
            if rest != 0 {
                let found = page + u64::from(rest.trailing_zeros());
                return (found < self.pages).then_some(found);
            }
            page = (page / 64 + 1) * 64;
        }
        None
    }

    /// The set as ranges of consecutive pages.
    pub fn runs(&self) -> impl Iterator<Item = std::ops::Range<u64>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.next(from, true)?;
            let end = self.next(start, false).unwrap_or(self.pages);
            from = end;
            Some(start..end)
        })
    }
}

/// A set of pages in memory that several threads or processes write.
#[derive(Clone, Copy, Debug)]
pub struct SharedBitmap<'a> {
    pages: u64,
    words: &'a [AtomicU64],
}

impl<'a> SharedBitmap<'a> {
    /// A view of `words`, which hold at least `pages` bits.
    pub fn new(pages: u64, words: &'a [AtomicU64]) -> Self {
        assert!(words.len() >= words_for(pages), "bitmap memory too small");
        Self { pages, words }
    }

    /// Whether the page is in the set.
    pub fn get(&self, page: u64) -> bool {
        page < self.pages
            && self.words[(page / 64) as usize].load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    /// Adds the pages, as far as they are in the memory.
    pub fn set_range(&self, pages: std::ops::Range<u64>) {
        let end = pages.end.min(self.pages);
        let mut page = pages.start;
        while page < end {
            let bit = page % 64;
            let count = (64 - bit).min(end - page);
            let mask = if count == 64 { u64::MAX } else { ((1 << count) - 1) << bit };
            self.words[(page / 64) as usize].fetch_or(mask, Ordering::AcqRel);
            page += count;
        }
    }

    /// First page in `from..to` whose membership is `member`.
    pub fn next(&self, from: u64, to: u64, member: bool) -> Option<u64> {
        let to = to.min(self.pages);
        let mut page = from;
        while page < to {
            let word = self.words[(page / 64) as usize].load(Ordering::Acquire);
            let rest = (if member { word } else { !word }) >> (page % 64);
            if rest != 0 {
                let found = page + u64::from(rest.trailing_zeros());
                return (found < to).then_some(found);
            }
            page = (page / 64 + 1) * 64;
        }
        None
    }

    /// A private copy.
    pub fn snapshot(&self) -> Bitmap {
        let words = self.words.iter().map(|word| word.load(Ordering::Acquire)).collect();
        Bitmap::from_words(self.pages, words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_set(
            pages in 1_u64..400,
            ranges in proptest::collection::vec((0_u64..420, 0_u64..140), 0..12),
        ) {
            let memory: Vec<AtomicU64> = (0..words_for(pages)).map(|_| AtomicU64::new(0)).collect();
            let shared = SharedBitmap::new(pages, &memory);
            let mut plain = Bitmap::new(pages);
            let mut model = std::collections::BTreeSet::new();
            for (start, len) in ranges {
                shared.set_range(start..start + len);
                for page in start..start + len {
                    plain.set(page);
                    if page < pages { model.insert(page); }
                }
            }
            prop_assert_eq!(&shared.snapshot(), &plain);
            prop_assert_eq!(plain.count(), model.len() as u64);
            let listed: Vec<u64> = plain.runs().flatten().collect();
            prop_assert_eq!(listed, model.iter().copied().collect::<Vec<_>>());
            for from in 0..pages {
                let expected = (from..pages).find(|page| !model.contains(page));
                prop_assert_eq!(shared.next(from, pages, false), expected);
            }
        }
    }
}
