//! Writes a delta layer: the changed pages of a guest, in any amount, in rising page order.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::delta::{ENCRYPTED_MAGIC, INDEX_PURPOSE, MAGIC, PAGES_PURPOSE, ZERO_SLOT};
use super::zero_map::is_zero;
use crate::seal::{FileCipher, KEY_LEN, Key, SealError, TAG_LEN};
use crate::sealed_file::{self, SealedFileError};
use crate::uffd::PAGE;

/// What a finished delta holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaSummary {
    /// Pages stored.
    pub data_pages: u64,
    /// Pages noted as zeros.
    pub zero_pages: u64,
    /// SHA-256 of the data file; of an encrypted one that of its index, which has the tag of every
    /// page.
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
    /// Per page: its slot, and its checksum or tag.
    entries: Vec<u8>,
    slots: u32,
    hash: Sha256,
    encryption: Option<Encryption>,
}

#[derive(Debug)]
struct Encryption {
    key: Key,
    salt: [u8; KEY_LEN],
    cipher: Box<FileCipher>,
    page: Box<[u8; PAGE as usize]>,
}

impl DeltaWriter {
    /// Starts a delta over a memory of `memory_pages` pages; refuses to overwrite a data file.
    pub fn create(data: &Path, index: &Path, memory_pages: u64) -> Result<Self, SealedFileError> {
        Self::create_with(data, index, memory_pages, None)
    }

    /// The same, encrypted when there is a key.
    pub fn create_with(
        data: &Path,
        index: &Path,
        memory_pages: u64,
        key: Option<&Key>,
    ) -> Result<Self, SealedFileError> {
        let encryption = key.map(|key| {
            let (cipher, salt) = FileCipher::generate(key, PAGES_PURPOSE)?;
            let page = Box::new([0; PAGE as usize]);
            Ok(Encryption { key: key.clone(), salt, cipher: Box::new(cipher), page })
        });
        let encryption =
            encryption.transpose().map_err(|e: SealError| SealedFileError::seal(data, e))?;
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
            encryption,
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
        let zero = is_zero(contents);
        let slot = if zero { ZERO_SLOT } else { self.slots };
        self.entries.extend_from_slice(&slot.to_le_bytes());
        let io = SealedFileError::io(&self.data_path);
        match &mut self.encryption {
            Some(_) if zero => self.entries.extend_from_slice(&[0; TAG_LEN]),
            None if zero => self.entries.extend_from_slice(&[0; 4]),
            Some(encryption) => {
                encryption.page.copy_from_slice(contents);
                let tag = encryption.cipher.seal_page(u64::from(slot), &mut *encryption.page);
                let tag = tag.map_err(|e| SealedFileError::seal(&self.data_path, e))?;
                self.data.write_all(&*encryption.page).map_err(io)?;
                self.entries.extend_from_slice(&tag);
            }
            None => {
                self.data.write_all(contents).map_err(io)?;
                self.hash.update(contents);
                self.entries.extend_from_slice(&crc32fast::hash(contents).to_le_bytes());
            }
        }
        self.slots += u32::from(!zero);
        self.pages.push(page);
        Ok(())
    }

    /// Writes the index. Neither file is synced: a snapshot is when it is published, all at once.
    pub fn finish(mut self) -> Result<DeltaSummary, SealedFileError> {
        let io = SealedFileError::io(&self.data_path);
        self.data.flush().map_err(&io)?;
        let mut digest: [u8; 32] = self.hash.finalize().into();
        let count = self.pages.len() as u64;
        let mut payload = Vec::with_capacity(56 + self.pages.len() * 8 + self.entries.len());
        for field in [self.memory_pages, count, u64::from(self.slots)] {
            payload.extend_from_slice(&field.to_le_bytes());
        }
        payload.extend_from_slice(self.encryption.as_ref().map_or(&digest, |e| &e.salt));
        payload.extend(self.pages.iter().flat_map(|page| page.to_le_bytes()));
        payload.extend_from_slice(&self.entries);
        match &self.encryption {
            None => sealed_file::write_unsynced(&self.index_path, MAGIC, &payload)?,
            Some(encryption) => {
                let sealed = encryption.key.seal(INDEX_PURPOSE, &payload);
                let sealed = sealed.map_err(|e| SealedFileError::seal(&self.index_path, e))?;
                digest = Sha256::digest(&sealed).into();
                sealed_file::write_unsynced(&self.index_path, ENCRYPTED_MAGIC, &sealed)?;
            }
        }
        let data_pages = u64::from(self.slots);
        Ok(DeltaSummary { data_pages, zero_pages: count - data_pages, digest })
    }
}
