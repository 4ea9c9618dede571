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

/// Digest and sizes of a file; holes are hashed as the zeros they read as, without reading them.
pub fn describe(path: &Path) -> io::Result<FileEntry> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    let length = meta.len();
    let mut hash = Sha256::new();
    let mut buffer = vec![0_u8; 1 << 20];
    let zeros = vec![0_u8; 1 << 20];
    let mut at = 0;
    let skip_to = |hash: &mut Sha256, from: u64, to: u64| {
        let mut left = to - from;
        while left > 0 {
            let n = left.min(zeros.len() as u64);
            hash.update(&zeros[..n as usize]);
            left -= n;
        }
    };
    for_each_extent(&file, length, |start, end| {
        skip_to(&mut hash, at, start);
        let mut pos = start;
        while pos < end {
            let n = (end - pos).min(buffer.len() as u64) as usize;
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut buffer[..n], pos)?;
            hash.update(&buffer[..n]);
            pos += n as u64;
        }
        at = end;
        Ok(())
    })?;
    skip_to(&mut hash, at, length);
    Ok(FileEntry {
        sha256: hex::encode(hash.finalize()),
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
    fn digest_of_a_sparse_file_is_that_of_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = File::create_new(&path).unwrap();
        file.set_len(3 << 20).unwrap();
        file.write_all_at(b"middle", 1 << 20).unwrap();
        let whole = Sha256::digest(std::fs::read(&path).unwrap());
        assert_eq!(describe(&path).unwrap().sha256, hex::encode(whole));
    }
}
