//! Copies of sparse files: a reflink where the filesystem can, the data extents where it cannot.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{SeekFrom, copy_file_range, ftruncate, ioctl_ficlone, seek};
use sha2::{Digest, Sha256};

use crate::manifest::FileEntry;

/// How a copy was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyKind {
    /// Shares every block until one side writes.
    Reflink,
    /// Only data extents were copied; holes stay holes.
    Sparse,
}

/// Copies `from` to the new file `to`.
pub fn clone_file(from: &Path, to: &Path) -> io::Result<CopyKind> {
    let source = File::open(from)?;
    let target = File::create_new(to)?;
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(CopyKind::Reflink);
    }
    let length = source.metadata()?.len();
    ftruncate(&target, length)?;
    for_each_extent(&source, length, |start, end| {
        let (mut from_at, mut to_at) = (start, start);
        while from_at < end {
            let wanted = usize::try_from(end - from_at).unwrap_or(usize::MAX);
            let n =
                copy_file_range(&source, Some(&mut from_at), &target, Some(&mut to_at), wanted)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    })?;
    Ok(CopyKind::Sparse)
}

/// Calls `f(start, end)` for every data extent.
pub fn for_each_extent(
    file: &File,
    length: u64,
    mut f: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = 0;
    while at < length {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(length);
        f(start, end)?;
        at = end;
    }
    Ok(())
}

/// Block of the content digest.
const BLOCK: usize = 64 << 10;

/// Content digest and sizes of a file.
///
/// The digest is SHA-256 over the file's length and then, in order, the offset and content of every
/// 64 KiB block that is not all zeros, numbers as 8 bytes little-endian. It says the same of two
/// files with the same content however they are laid out, and costs nothing for holes: disks and
/// memories are mostly holes.
pub fn describe(path: &Path) -> io::Result<FileEntry> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    let length = meta.len();
    let mut hash = Sha256::new();
    hash.update(length.to_le_bytes());
    let mut buffer = vec![0_u8; BLOCK];
    // Extents need not be aligned to blocks; a block is looked at once.
    let mut next = 0;
    for_each_extent(&file, length, |start, end| {
        let mut at = (start - start % BLOCK as u64).max(next);
        while at < end {
            let n = (length - at).min(BLOCK as u64) as usize;
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut buffer[..n], at)?;
            if buffer[..n].iter().any(|b| *b != 0) {
                hash.update(at.to_le_bytes());
                hash.update(&buffer[..n]);
            }
            at += BLOCK as u64;
        }
        next = at;
        Ok(())
    })?;
    Ok(FileEntry {
        digest: hex::encode(hash.finalize()),
        bytes: length,
        allocated_bytes: meta.blocks() * 512,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_copy_has_the_bytes_and_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create_new(&a).unwrap();
        file.set_len(16 << 20).unwrap();
        file.write_all_at(b"near the start", 8192).unwrap();
        file.write_all_at(b"at the very end", (16 << 20) - 15).unwrap();
        clone_file(&a, &b).unwrap();
        assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
        let blocks = std::fs::metadata(&b).unwrap().blocks() * 512;
        assert!(blocks < 1 << 20, "{blocks} bytes allocated for two small extents");
    }

    #[test]
    fn the_digest_is_of_the_content_not_of_the_layout() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("sparse"), dir.path().join("dense"));
        let file = File::create_new(&a).unwrap();
        file.set_len((3 << 20) + 17).unwrap();
        file.write_all_at(b"middle", (1 << 20) - 3).unwrap();
        file.write_all_at(b"end", (3 << 20) + 14).unwrap();
        std::fs::write(&b, std::fs::read(&a).unwrap()).unwrap();
        let digest = describe(&a).unwrap().digest;
        assert_eq!(digest, describe(&b).unwrap().digest);
        file.write_all_at(b"x", 2 << 20).unwrap();
        assert_ne!(digest, describe(&a).unwrap().digest);
    }
}
