//! An upper layer: only the pages that changed, one after another in a data file, found through an
//! index file.
//!
//! Index payload: memory pages, entries, slots, the SHA-256 of the data file; then the page numbers
//! in rising order, then per entry its slot (all ones: the page became zeros) and the CRC-32 of its
//! contents. The checksum is looked at on every read, so a damaged page is an error.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use sha2::{Digest, Sha256};

use super::{Fingerprint, Lookup, PageSource, SourceError};
use crate::sealed_file::{self, Fields, SealedFileError};
use crate::uffd::PAGE;

pub(super) const MAGIC: &[u8; 8] = b"RTHWDI01";
/// Slot of a page that became zeros.
pub(super) const ZERO_SLOT: u32 = u32::MAX;
const MAX_PAGES: u64 = 1 << 30;

/// A delta, open.
#[derive(Debug)]
pub struct DeltaLayer {
    data: File,
    path: PathBuf,
    fingerprint: Fingerprint,
    digest: [u8; 32],
    memory_pages: u64,
    pages: Vec<u64>,
    slots: Vec<u32>,
    /// By slot.
    checksums: Vec<u32>,
}

impl DeltaLayer {
    /// Opens a delta from its data file and its index.
    pub fn open(data: &Path, index: &Path) -> Result<Self, SourceError> {
        let open = |path: &Path| {
            File::open(path)
                .map_err(|source| SourceError::Open { path: path.to_path_buf(), source })
        };
        Self::new(open(data)?, data, &open(index)?, index)
    }

    /// Takes open files; the paths are for messages.
    pub fn new(
        data: File,
        path: &Path,
        index: &File,
        index_path: &Path,
    ) -> Result<Self, SourceError> {
        let wrong = |reason: &str| SealedFileError::contents(index_path, reason);
        let payload = sealed_file::read(index, index_path, MAGIC, 56 + MAX_PAGES * 16)?;
        let mut fields = Fields(&payload);
        let mut header = [0_u64; 3];
        for field in &mut header {
            *field = fields.u64().ok_or_else(|| wrong("no header"))?;
        }
        let [memory_pages, entries, slot_count] = header;
        let (digest, rest) = fields.0.split_first_chunk().ok_or_else(|| wrong("no digest"))?;
        let digest = *digest;
        fields.0 = rest;
        if memory_pages > MAX_PAGES || entries > memory_pages || slot_count > entries {
            return Err(wrong("more entries than pages").into());
        }
        if fields.0.len() as u64 != entries * 16 {
            return Err(wrong("its length is not that of its entries").into());
        }
        let pages: Vec<u64> = (0..entries).filter_map(|_| fields.u64()).collect();
        let in_order = pages.windows(2).all(|pair| pair[0] < pair[1]);
        if !in_order || pages.last().is_some_and(|last| *last >= memory_pages) {
            return Err(wrong("page numbers out of order or beyond the memory").into());
        }
        let mut slots = Vec::with_capacity(entries as usize);
        let mut checksums = vec![0; slot_count as usize];
        for _ in 0..entries {
            let (slot, checksum) = (fields.u32().unwrap_or(0), fields.u32().unwrap_or(0));
            if slot != ZERO_SLOT {
                let entry = checksums.get_mut(slot as usize);
                *entry.ok_or_else(|| wrong("a slot beyond the data file"))? = checksum;
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
        Ok(Self { data, path, fingerprint, digest, memory_pages, pages, slots, checksums })
    }

    /// Size of the guest's memory, in pages.
    pub fn memory_pages(&self) -> u64 {
        self.memory_pages
    }

    /// Pages this layer has an opinion on.
    pub fn len_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Reads all of the data file and compares its digest; for when a delta was copied or fetched.
    pub fn verify(&self) -> Result<(), SourceError> {
        let mut hash = Sha256::new();
        let mut chunk = vec![0; 1 << 20];
        let mut at = 0;
        while at < self.fingerprint.len {
            let want = chunk.len().min((self.fingerprint.len - at) as usize);
            self.data.read_exact_at(&mut chunk[..want], at).map_err(|source| {
                SourceError::Read { path: self.path.clone(), page: at / PAGE, source }
            })?;
            hash.update(&chunk[..want]);
            at += want as u64;
        }
        if hash.finalize().as_slice() == self.digest {
            return Ok(());
        }
        Err(SourceError::Changed { path: self.path.clone(), what: "its digest".into() })
    }

    pub(super) fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

impl PageSource for DeltaLayer {
    fn lookup(&self, page: u64) -> Lookup {
        match self.pages.binary_search(&page) {
            Err(_) => Lookup::Absent,
            Ok(entry) if self.slots[entry] == ZERO_SLOT => Lookup::Zero,
            Ok(entry) => Lookup::At(u64::from(self.slots[entry])),
        }
    }

    fn read(&self, place: u64, page: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        self.data.read_exact_at(buffer, place * PAGE).map_err(|source| SourceError::Read {
            path: self.path.clone(),
            page,
            source,
        })?;
        for (i, bytes) in buffer.chunks_exact(PAGE as usize).enumerate() {
            if self.checksums.get(place as usize + i) != Some(&crc32fast::hash(bytes)) {
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
