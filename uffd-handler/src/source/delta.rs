//! An upper layer: only the pages that changed, one after another in a data file, found through an
//! index file.
//!
//! Index payload: memory pages, entries, slots, the SHA-256 of the data file; then the page numbers
//! in rising order, then per entry its slot (all ones: the page became zeros) and the CRC-32 of its
//! contents. The checksum is looked at on every read, so a damaged page is an error.
//!
//! An encrypted delta has the salt of its pages' cipher in place of the digest, and their tags in
//! place of the checksums; its index is encrypted as a whole, so that not even which pages changed
//! is told.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use sha2::{Digest, Sha256};

use super::{Fingerprint, Lookup, PageSource, SourceError};
use crate::seal::{FileCipher, Key, SealError, TAG_LEN};
use crate::sealed_file::{self, Fields, SealedFileError};
use crate::uffd::PAGE;

pub(super) const MAGIC: &[u8; 8] = b"RTHWDI01";
pub(super) const ENCRYPTED_MAGIC: &[u8; 8] = b"RTHWDE01";
/// What a delta's keys are derived for.
pub(super) const PAGES_PURPOSE: &str = "delta pages";
pub(super) const INDEX_PURPOSE: &str = "delta index";
/// Slot of a page that became zeros.
pub(super) const ZERO_SLOT: u32 = u32::MAX;
const MAX_PAGES: u64 = 1 << 30;

/// A delta, open.
#[derive(Debug)]
pub struct DeltaLayer {
    data: File,
    path: PathBuf,
    fingerprint: Fingerprint,
    memory_pages: u64,
    pages: Vec<u64>,
    slots: Vec<u32>,
    checks: Checks,
}

/// How a page is known to be what was written, by slot.
#[derive(Debug)]
enum Checks {
    /// The digest is that of the whole data file.
    Plain {
        digest: [u8; 32],
        checksums: Vec<u32>,
    },
    Encrypted {
        cipher: Box<FileCipher>,
        tags: Vec<[u8; TAG_LEN]>,
    },
}

impl Checks {
    /// Bytes of an index entry behind its slot.
    fn entry_len(&self) -> usize {
        match self {
            Self::Plain { .. } => 4,
            Self::Encrypted { .. } => TAG_LEN,
        }
    }

    fn set(&mut self, slot: usize, bytes: &[u8]) -> Option<()> {
        match self {
            Self::Plain { checksums, .. } => {
                *checksums.get_mut(slot)? = u32::from_le_bytes(bytes.try_into().ok()?);
            }
            Self::Encrypted { tags, .. } => *tags.get_mut(slot)? = bytes.try_into().ok()?,
        }
        Some(())
    }

    /// Makes the page in this slot what was written, or says that it cannot be.
    fn restore(&self, slot: u64, page: &mut [u8]) -> bool {
        match self {
            Self::Plain { checksums, .. } => {
                checksums.get(slot as usize) == Some(&crc32fast::hash(page))
            }
            Self::Encrypted { cipher, tags } => {
                tags.get(slot as usize).is_some_and(|tag| cipher.open_page(slot, page, tag).is_ok())
            }
        }
    }
}

impl DeltaLayer {
    /// Opens a delta from its data file and its index.
    pub fn open(data: &Path, index: &Path, key: Option<&Key>) -> Result<Self, SourceError> {
        let open = |path: &Path| {
            File::open(path)
                .map_err(|source| SourceError::Open { path: path.to_path_buf(), source })
        };
        Self::new(open(data)?, data, &open(index)?, index, key)
    }

    /// Takes open files; the paths are for messages. One that was written with a key needs it.
    pub fn new(
        data: File,
        path: &Path,
        index: &File,
        index_path: &Path,
        key: Option<&Key>,
    ) -> Result<Self, SourceError> {
        let wrong = |reason: &str| SealedFileError::contents(index_path, reason);
        let max = 128 + MAX_PAGES * (12 + TAG_LEN as u64);
        let payload = match key {
            None => sealed_file::read(index, index_path, MAGIC, max)?,
            Some(key) => {
                let sealed = sealed_file::read(index, index_path, ENCRYPTED_MAGIC, max)?;
                let opened = key.open(INDEX_PURPOSE, &sealed);
                opened.map_err(|source| sealed_error(index_path, source))?.to_vec()
            }
        };
        let mut fields = Fields(&payload);
        let mut header = [0_u64; 3];
        for field in &mut header {
            *field = fields.u64().ok_or_else(|| wrong("no header"))?;
        }
        let [memory_pages, entries, slot_count] = header;
        let (digest, rest) = fields.0.split_first_chunk().ok_or_else(|| wrong("no digest"))?;
        fields.0 = rest;
        if memory_pages > MAX_PAGES || entries > memory_pages || slot_count > entries {
            return Err(wrong("more entries than pages").into());
        }
        let slots_used = slot_count as usize;
        let mut checks = match key {
            None => Checks::Plain { digest: *digest, checksums: vec![0; slots_used] },
            Some(key) => Checks::Encrypted {
                cipher: Box::new(FileCipher::new(key, digest, PAGES_PURPOSE)),
                tags: vec![[0; TAG_LEN]; slots_used],
            },
        };
        let entry_len = checks.entry_len();
        if fields.0.len() as u64 != entries * (12 + entry_len as u64) {
            return Err(wrong("its length is not that of its entries").into());
        }
        let pages: Vec<u64> = (0..entries).filter_map(|_| fields.u64()).collect();
        let in_order = pages.windows(2).all(|pair| pair[0] < pair[1]);
        if !in_order || pages.last().is_some_and(|last| *last >= memory_pages) {
            return Err(wrong("page numbers out of order or beyond the memory").into());
        }
        let mut slots = Vec::with_capacity(entries as usize);
        for entry in fields.0.chunks_exact(4 + entry_len) {
            let slot = Fields(entry).u32().unwrap_or(ZERO_SLOT);
            if slot != ZERO_SLOT {
                let set = checks.set(slot as usize, &entry[4..]);
                set.ok_or_else(|| wrong("a slot beyond the data file"))?;
            }
            slots.push(slot);
        }
        let fingerprint = Fingerprint::of(&data)
            .map_err(|source| SourceError::Open { path: path.to_path_buf(), source })?;
        if fingerprint.len != slot_count * PAGE {
            return Err(SourceError::Size {
                path: path.to_path_buf(),
                expected: slot_count * PAGE,
                found: fingerprint.len,
            });
        }
        let path = path.to_path_buf();
        Ok(Self { data, path, fingerprint, memory_pages, pages, slots, checks })
    }

    /// Size of the guest's memory, in pages.
    pub fn memory_pages(&self) -> u64 {
        self.memory_pages
    }

    /// Pages this layer has an opinion on.
    pub fn len_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// The pages this layer has an opinion on, in rising order, each with what it says.
    pub fn entries(&self) -> impl Iterator<Item = (u64, Lookup)> + '_ {
        self.pages.iter().zip(&self.slots).map(|(page, slot)| (*page, place(*slot)))
    }

    /// Reads all of the data file and checks it; for when a delta was copied or fetched.
    pub fn verify(&self) -> Result<(), SourceError> {
        let mut hash = Sha256::new();
        let mut page = [0; PAGE as usize];
        for slot in 0..self.fingerprint.len / PAGE {
            self.read_raw(slot, slot, &mut page)?;
            match &self.checks {
                Checks::Plain { .. } => hash.update(page),
                checks if checks.restore(slot, &mut page) => {}
                Checks::Encrypted { .. } => {
                    return Err(SourceError::Damaged { path: self.path.clone(), page: slot });
                }
            }
        }
        match &self.checks {
            Checks::Plain { digest, .. } if hash.finalize().as_slice() != digest => {
                Err(SourceError::Changed { path: self.path.clone(), what: "its digest".into() })
            }
            _ => Ok(()),
        }
    }

    fn read_raw(&self, place: u64, page: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let read = self.data.read_exact_at(buffer, place * PAGE);
        read.map_err(|source| SourceError::Read { path: self.path.clone(), page, source })
    }

    pub(super) fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

fn sealed_error(path: &Path, source: SealError) -> SourceError {
    SourceError::Sealed { path: path.to_path_buf(), source }
}

fn place(slot: u32) -> Lookup {
    if slot == ZERO_SLOT { Lookup::Zero } else { Lookup::At(u64::from(slot)) }
}

impl PageSource for DeltaLayer {
    fn lookup(&self, page: u64) -> Lookup {
        match self.pages.binary_search(&page) {
            Err(_) => Lookup::Absent,
            Ok(entry) => place(self.slots[entry]),
        }
    }

    fn read(&self, place: u64, page: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        self.read_raw(place, page, buffer)?;
        for (i, bytes) in buffer.chunks_exact_mut(PAGE as usize).enumerate() {
            if !self.checks.restore(place + i as u64, bytes) {
                return Err(SourceError::Damaged {
                    path: self.path.clone(),
                    page: page + i as u64,
                });
            }
        }
        Ok(())
    }

    fn check_unchanged(&self) -> Result<(), SourceError> {
        self.fingerprint.check(&self.data, &self.path)
    }

    fn will_need(&self, place: u64, pages: u64) {
        // Advice only.
        let _ = posix_fadvise(
            &self.data,
            (place * PAGE) as i64,
            (pages * PAGE) as i64,
            PosixFadviseAdvice::POSIX_FADV_WILLNEED,
        );
    }
}
