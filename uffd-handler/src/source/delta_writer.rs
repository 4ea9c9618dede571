//! Writes a delta layer: the changed pages of a guest, in any amount, in rising page order.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::delta::{MAGIC, ZERO_SLOT};
use super::zero_map::is_zero;
use crate::sealed_file::{self, SealedFileError};
use crate::uffd::PAGE;

/// What a finished delta holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaSummary {
    /// Pages stored.
    pub data_pages: u64,
    /// Pages noted as zeros.
    pub zero_pages: u64,
    /// SHA-256 of the data file.
    pub digest: [u8; 32],
}

/// A delta being written. The index is written last: a delta without one is no delta.
#[derive(Debug)]
pub struct DeltaWriter {
    data: BufWriter<File>,
    data_path: PathBuf,
    index_path: PathBuf,
    memory_pages: u64,
    pages: Vec<u64>,
    entries: Vec<(u32, u32)>,
    slots: u32,
    hash: Sha256,
}

impl DeltaWriter {
    /// Starts a delta over a memory of `memory_pages` pages; refuses to overwrite a data file.
    pub fn create(data: &Path, index: &Path, memory_pages: u64) -> Result<Self, SealedFileError> {
        let file = File::create_new(data).map_err(SealedFileError::io(data))?;
        Ok(Self {
            data: BufWriter::with_capacity(1 << 20, file),
            data_path: data.to_path_buf(),
            index_path: index.to_path_buf(),
            memory_pages,
            pages: Vec::new(),
            entries: Vec::new(),
            slots: 0,
            hash: Sha256::new(),
        })
    }

    /// Adds a page with its new contents; all zeros are noted and not stored.
    pub fn page(&mut self, page: u64, contents: &[u8]) -> Result<(), SealedFileError> {
        let wrong = |reason: String| SealedFileError::contents(&self.data_path, reason);
        if contents.len() as u64 != PAGE || page >= self.memory_pages {
            return Err(wrong(format!("page {page} with {} bytes", contents.len())));
        }
        if self.pages.last().is_some_and(|last| *last >= page) {
            return Err(wrong(format!("page {page} after {:?}", self.pages.last())));
        }
        if is_zero(contents) {
            self.entries.push((ZERO_SLOT, 0));
        } else {
            self.data.write_all(contents).map_err(SealedFileError::io(&self.data_path))?;
            self.hash.update(contents);
            self.entries.push((self.slots, crc32fast::hash(contents)));
            self.slots += 1;
        }
        self.pages.push(page);
        Ok(())
    }

    /// Syncs the data file, then publishes the index.
    pub fn finish(mut self) -> Result<DeltaSummary, SealedFileError> {
        let io = SealedFileError::io(&self.data_path);
        self.data.flush().map_err(&io)?;
        self.data.get_ref().sync_all().map_err(&io)?;
        let digest: [u8; 32] = self.hash.finalize().into();
        let entries = self.pages.len() as u64;
        let mut payload = Vec::with_capacity(56 + self.pages.len() * 16);
        for field in [self.memory_pages, entries, u64::from(self.slots)] {
            payload.extend_from_slice(&field.to_le_bytes());
        }
        payload.extend_from_slice(&digest);
        payload.extend(self.pages.iter().flat_map(|page| page.to_le_bytes()));
        for (slot, checksum) in &self.entries {
            payload.extend_from_slice(&slot.to_le_bytes());
            payload.extend_from_slice(&checksum.to_le_bytes());
        }
        sealed_file::write(&self.index_path, MAGIC, &payload)?;
        let data_pages = u64::from(self.slots);
        Ok(DeltaSummary { data_pages, zero_pages: entries - data_pages, digest })
    }
}
