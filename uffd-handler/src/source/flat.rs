//! The bottom layer: a file with every page of the guest's memory in its place.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::{Fingerprint, Lookup, PageSource, SourceError, ZeroMap, residency};
use crate::uffd::PAGE;

/// A flat memory file, open.
///
/// Demand faults read it, so that an unreadable page is an error. Bulk installs hand the kernel
/// addresses in a mapping, which no code of this process ever reads: a page that went away is an
/// errno of that call then, and not a SIGBUS.
#[derive(Debug)]
pub struct FlatLayer {
    file: File,
    path: PathBuf,
    fingerprint: Fingerprint,
    mapping: MmapRaw,
    /// Whether the kernel says which pages of the file are in memory.
    residency_told: bool,
    zero: Option<ZeroMap>,
}

impl FlatLayer {
    /// Takes an open file of exactly `memory_bytes`, and the map of its zero pages if there is one.
    pub fn new(
        file: File,
        path: &Path,
        memory_bytes: u64,
        zero: Option<ZeroMap>,
    ) -> Result<Self, SourceError> {
        let open = |source| SourceError::Open { path: path.to_path_buf(), source };
        let fingerprint = Fingerprint::of(&file).map_err(open)?;
        if fingerprint.len != memory_bytes || memory_bytes == 0 {
            let (expected, found) = (memory_bytes, fingerprint.len);
            return Err(SourceError::Size { path: path.to_path_buf(), expected, found });
        }
        let mapping = MmapOptions::new().map_raw_read_only(&file).map_err(open)?;
        let residency_told = residency::is_told(&file);
        Ok(Self { file, path: path.to_path_buf(), fingerprint, mapping, residency_told, zero })
    }

    pub(super) fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

impl PageSource for FlatLayer {
    fn lookup(&self, page: u64) -> Lookup {
        match &self.zero {
            Some(zero) if zero.is_zero(page) => Lookup::Zero,
            _ => Lookup::At(page),
        }
    }

    fn read(&self, place: u64, page: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        self.file.read_exact_at(buffer, place * PAGE).map_err(|source| SourceError::Read {
            path: self.path.clone(),
            page,
            source,
        })
    }

    fn mapped(&self, place: u64) -> Option<*const u8> {
        let offset = place * PAGE;
        (offset < self.fingerprint.len).then(|| self.mapping.as_ptr().wrapping_add(offset as usize))
    }

    fn populate(&self, place: u64, page: u64, pages: u64) -> Result<(), SourceError> {
        let Some(start) = self.mapped(place) else { return Ok(()) };
        let len = (pages * PAGE).min(self.fingerprint.len - place * PAGE) as usize;
        if self.residency_told && residency::is_resident(start, len) {
            // As it is for every VM of a template but the first. What is not mapped yet, the install
            // maps without waiting for a disk; behind the end of a file that became shorter it fails,
            // as it does when that happens after this.
            return Ok(());
        }
        // SAFETY: the range lies in the mapping; populating changes nothing and touches nothing
        // from user space.
        let done = unsafe { libc::madvise(start as *mut _, len, libc::MADV_POPULATE_READ) };
        match done {
            0 => Ok(()),
            _ => match std::io::Error::last_os_error() {
                // A kernel before 5.14 does it page by page during the install.
                error if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
                source => Err(SourceError::Read { path: self.path.clone(), page, source }),
            },
        }
    }

    fn check_unchanged(&self) -> Result<(), SourceError> {
        self.fingerprint.check(&self.file, &self.path)
    }

    fn will_need(&self, place: u64, pages: u64) {
        // Advice only: a file system that knows nothing of it costs us a slower read.
        let _ = posix_fadvise(
            &self.file,
            (place * PAGE) as i64,
            (pages * PAGE) as i64,
            PosixFadviseAdvice::POSIX_FADV_WILLNEED,
        );
    }
}
