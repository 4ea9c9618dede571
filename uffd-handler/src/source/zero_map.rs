//! Which pages of a flat memory file are all zeros: found once, when the snapshot is made, so that
//! they are installed without being read and cost their VMs no memory until written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::bitmap::{Bitmap, words_for};
use crate::sealed_file::{self, Fields, SealedFileError};
use crate::uffd::PAGE;

const MAGIC: &[u8; 8] = b"RTHWZM01";
const MAX_PAGES: u64 = 1 << 30;
/// Bytes looked at per read.
const CHUNK: usize = 1 << 20;

/// The zero pages of one flat file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZeroMap {
    zero: Bitmap,
}

impl ZeroMap {
    /// Finds the zero pages of a memory file: its holes, and what reads as zeros.
    pub fn scan(path: &Path) -> Result<Self, SealedFileError> {
        let io = SealedFileError::io(path);
        let file = File::open(path).map_err(&io)?;
        let len = file.metadata().map_err(&io)?.len();
        if len == 0 || len % PAGE != 0 || len / PAGE > MAX_PAGES {
            return Err(SealedFileError::contents(path, format!("a memory of {len} bytes")));
        }
        let errno = |errno: Errno| io(errno.into());
        let mut zero = Bitmap::from_words(len / PAGE, vec![u64::MAX; words_for(len / PAGE)]);
        let mut words = zero.words().to_vec();
        let mut chunk = vec![0_u8; CHUNK];
        let mut at = 0_u64;
        while at < len {
            let data = match lseek(&file, at as i64, Whence::SeekData) {
                Ok(data) => data as u64 / PAGE * PAGE,
                Err(Errno::ENXIO) => break,
                Err(other) => return Err(errno(other)),
            };
            let hole = lseek(&file, data.max(at) as i64, Whence::SeekHole).map_err(errno)? as u64;
            at = data;
            while at < hole.min(len) {
                let want = (CHUNK as u64).min(len - at) as usize;
                file.read_exact_at(&mut chunk[..want], at).map_err(&io)?;
                for page in chunk[..want].chunks_exact(PAGE as usize) {
                    if !is_zero(page) {
                        words[(at / PAGE / 64) as usize] &= !(1 << (at / PAGE % 64));
                    }
                    at += PAGE;
                }
            }
        }
        zero = Bitmap::from_words(len / PAGE, words);
        Ok(Self { zero })
    }

    /// Whether a page is known to be zeros.
    pub fn is_zero(&self, page: u64) -> bool {
        self.zero.get(page)
    }

    /// Number of zero pages.
    pub fn len_pages(&self) -> u64 {
        self.zero.count()
    }

    /// Size of the memory it belongs to, in pages.
    pub fn memory_pages(&self) -> u64 {
        self.zero.pages()
    }

    /// Stores it beside its memory file.
    pub fn save(&self, path: &Path) -> Result<(), SealedFileError> {
        let mut payload = self.memory_pages().to_le_bytes().to_vec();
        payload.extend(self.zero.words().iter().flat_map(|word| word.to_le_bytes()));
        sealed_file::write(path, MAGIC, &payload)
    }

    /// Loads one from its file.
    pub fn load(path: &Path) -> Result<Self, SealedFileError> {
        Self::read(&File::open(path).map_err(SealedFileError::io(path))?, path)
    }

    /// Loads one from an open file; `path` is for messages.
    pub fn read(file: &File, path: &Path) -> Result<Self, SealedFileError> {
        let payload = sealed_file::read(file, path, MAGIC, 8 + MAX_PAGES / 8)?;
        let mut fields = Fields(&payload);
        let pages = fields.u64().unwrap_or(0);
        if pages == 0 || pages > MAX_PAGES || fields.0.len() != words_for(pages) * 8 {
            return Err(SealedFileError::contents(path, format!("a memory of {pages} pages")));
        }
        let words = std::iter::from_fn(|| fields.u64()).collect();
        Ok(Self { zero: Bitmap::from_words(pages, words) })
    }
}

/// Whether every byte is zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: any bit pattern is a u64; `align_to` keeps the unaligned ends apart.
    let (head, words, tail) = unsafe { bytes.align_to::<u64>() };
    head.iter().all(|byte| *byte == 0)
        && words.chunks(8).all(|line| line.iter().fold(0, |all, word| all | word) == 0)
        && tail.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_written_zeros_are_both_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let file = File::create(&path).unwrap();
        file.set_len(600 * PAGE).unwrap();
        file.write_all_at(&[7; 4096], 3 * PAGE).unwrap();
        file.write_all_at(&[0; 4096], 4 * PAGE).unwrap();
        file.write_all_at(&[1], 300 * PAGE + 4095).unwrap();
        file.write_all_at(&[9; 8192], 598 * PAGE).unwrap();
        let map = ZeroMap::scan(&path).unwrap();
        let data: Vec<u64> = (0..600).filter(|page| !map.is_zero(*page)).collect();
        assert_eq!(data, [3, 300, 598, 599]);
        assert_eq!(map.len_pages(), 596);
        let stored = dir.path().join("zero");
        map.save(&stored).unwrap();
        assert_eq!(ZeroMap::load(&stored).unwrap(), map);
        assert!(!map.is_zero(600), "beyond the memory nothing is known");
    }
}
