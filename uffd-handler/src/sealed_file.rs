//! Small side files of a memory snapshot (working set, zero map, delta index): written so that a
//! crash leaves the old file or the new one, and read so that damage is noticed.
//!
//! Layout: eight bytes of magic, the payload, the SHA-256 of both.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::seal::SealError;

const DIGEST_LEN: usize = 32;
const MAGIC_LEN: usize = 8;

/// Why a side file could not be written or read.
#[derive(Debug, Error)]
pub enum SealedFileError {
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is longer than its kind ever gets.
    #[error("{path}: {len} bytes; at most {max} make sense")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// Another kind of file.
    #[error("{0}: not a file of this kind or version")]
    WrongKind(PathBuf),
    /// The digest does not match.
    #[error("{0}: damaged, its digest does not match")]
    Damaged(PathBuf),
    /// The digest matches and the contents make no sense for this memory.
    #[error("{path}: {reason}")]
    Contents {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It could not be encrypted.
    #[error("{path}: {source}")]
    Seal {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: SealError,
    },
}

impl SealedFileError {
    pub(crate) fn seal(path: &Path, source: SealError) -> Self {
        Self::Seal { path: path.to_path_buf(), source }
    }

    pub(crate) fn io(path: &Path) -> impl Fn(std::io::Error) -> Self + '_ {
        |source| Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn contents(path: &Path, reason: impl Into<String>) -> Self {
        Self::Contents { path: path.to_path_buf(), reason: reason.into() }
    }
}

/// Writes a new file that somebody else will sync, with what else is in its directory.
pub fn write_unsynced(path: &Path, magic: &[u8; 8], payload: &[u8]) -> Result<(), SealedFileError> {
    let digest = Sha256::new().chain_update(magic).chain_update(payload).finalize();
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(magic)?;
        file.write_all(payload)?;
        file.write_all(&digest)
    };
    write().map_err(SealedFileError::io(path))
}

/// Writes the file beside its place, syncs it and renames it there.
pub fn write(path: &Path, magic: &[u8; 8], payload: &[u8]) -> Result<(), SealedFileError> {
    let io = SealedFileError::io(path);
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let digest = Sha256::new().chain_update(magic).chain_update(payload).finalize();
    let result = (|| {
        let mut file = File::create(&temporary)?;
        file.write_all(magic)?;
        file.write_all(payload)?;
        file.write_all(&digest)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    })();
    if result.is_err() {
        // Best effort: the error that counts is the one above.
        let _ = std::fs::remove_file(&temporary);
    }
    result.map_err(io)
}

/// Reads the payload of an open file; `path` is for messages.
pub fn read(
    file: &File,
    path: &Path,
    magic: &[u8; 8],
    max_payload: u64,
) -> Result<Vec<u8>, SealedFileError> {
    let io = SealedFileError::io(path);
    let len = file.metadata().map_err(&io)?.len();
    let max = max_payload + (MAGIC_LEN + DIGEST_LEN) as u64;
    if len > max {
        return Err(SealedFileError::TooLong { path: path.to_path_buf(), len, max });
    }
    // Positioned reads: the descriptor may be shared with another process.
    let mut bytes = Vec::with_capacity(len as usize);
    let mut reader = PositionedReader { file, at: 0 };
    reader.by_ref().take(max + 1).read_to_end(&mut bytes).map_err(&io)?;
    if bytes.len() < MAGIC_LEN + DIGEST_LEN || &bytes[..MAGIC_LEN] != magic {
        return Err(SealedFileError::WrongKind(path.to_path_buf()));
    }
    let digest = bytes.split_off(bytes.len() - DIGEST_LEN);
    if Sha256::digest(&bytes).as_slice() != digest {
        return Err(SealedFileError::Damaged(path.to_path_buf()));
    }
    bytes.drain(..MAGIC_LEN);
    Ok(bytes)
}

struct PositionedReader<'a> {
    file: &'a File,
    at: u64,
}

impl Read for PositionedReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let got = std::os::unix::fs::FileExt::read_at(self.file, buffer, self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

/// Takes little-endian numbers off the front of a payload.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub(crate) fn u64(&mut self) -> Option<u64> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*head))
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_of_every_byte_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        write(&path, b"MAGIC__1", b"payload").unwrap();
        let read_back = || read(&File::open(&path).unwrap(), &path, b"MAGIC__1", 100);
        assert_eq!(read_back().unwrap(), b"payload");
        let whole = std::fs::read(&path).unwrap();
        for i in 0..whole.len() {
            let mut bad = whole.clone();
            bad[i] ^= 0x10;
            std::fs::write(&path, &bad).unwrap();
            assert!(read_back().is_err(), "byte {i}");
            std::fs::write(&path, &whole[..i]).unwrap();
            assert!(read_back().is_err(), "cut at {i}");
        }
        std::fs::write(&path, vec![0; 1000]).unwrap();
        assert!(matches!(read_back(), Err(SealedFileError::TooLong { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }
}
