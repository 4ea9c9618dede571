//! Where a guest's saved pages come from.
//!
//! A memory is a chain of layers: a flat file of exactly the guest's size at the bottom, and above
//! it deltas that hold only the pages a derived template or a paused workspace changed. A page is
//! looked up from the top down. Whatever cannot be read is an error and never zeros.

mod delta;
mod delta_writer;
mod flat;
mod layers;
mod residency;
mod zero_map;

pub use delta::DeltaLayer;
pub use delta_writer::{DeltaSummary, DeltaWriter};
pub use flat::FlatLayer;
pub use layers::{LayerFiles, MemoryLayers, OpenLayer, Run, RunKind};
pub use zero_map::ZeroMap;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::seal::SealError;
use crate::sealed_file::SealedFileError;

/// Why a page could not be had, or a layer not opened.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The file system refused.
    #[error("{path}: page {page}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Page of the guest's memory.
        page: u64,
        /// The cause.
        source: std::io::Error,
    },
    /// A page's checksum is not the one in the index.
    #[error("{path}: page {page} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Page of the guest's memory.
        page: u64,
    },
    /// The file is not what it was when it was opened.
    #[error("{path} was changed while in use: {what}")]
    Changed {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A file has the wrong size.
    #[error("{path} has {found} bytes where {expected} are needed")]
    Size {
        /// The file.
        path: PathBuf,
        /// Bytes it must have.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// A file could not be opened or examined.
    #[error("{path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A side file (zero map, delta index) is unusable.
    #[error(transparent)]
    SideFile(#[from] SealedFileError),
    /// An encrypted layer does not open, or its key is not to be had.
    #[error("{path}: {source}")]
    Sealed {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: SealError,
    },
    /// The chain has no flat file at its bottom, or one elsewhere.
    #[error("{0} layer(s) without exactly one flat file, at the bottom")]
    Shape(usize),
}

impl SourceError {
    /// Whether trying again can help: a failed read may, a damaged or changed file cannot.
    pub fn is_transient(&self) -> bool {
        use std::io::ErrorKind;
        matches!(self, Self::Read { source, .. } if source.kind() != ErrorKind::UnexpectedEof)
    }
}

/// What a page turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// All zeros; the buffer was not written.
    Zero,
    /// The buffer holds it.
    Data,
}

/// What one layer says about a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The page is not in this layer: ask the one below.
    Absent,
    /// The layer says it is zeros.
    Zero,
    /// The layer has it, at this place of its own.
    At(u64),
}

/// One layer of a memory. A new kind of storage (compressed, remote) is one more implementation.
pub trait PageSource: Send + Sync {
    /// What the layer says about a page; no I/O.
    fn lookup(&self, page: u64) -> Lookup;

    /// Reads consecutive places, filling whole pages of `buffer`; `page` is for messages.
    fn read(&self, place: u64, page: u64, buffer: &mut [u8]) -> Result<(), SourceError>;

    /// Address of a place, when an install may take it from a mapping without reading first.
    fn mapped(&self, _place: u64) -> Option<*const u8> {
        None
    }

    /// Fails when the file is no longer the one that was opened.
    fn check_unchanged(&self) -> Result<(), SourceError>;

    /// Has these places of a mapping ready, so that an install from it waits for nothing; fails
    /// when they cannot be read.
    fn populate(&self, _place: u64, _page: u64, _pages: u64) -> Result<(), SourceError> {
        Ok(())
    }

    /// Tells the kernel that these places are wanted soon.
    fn will_need(&self, place: u64, pages: u64);
}

/// Identity and state of a file at the time it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Fingerprint {
    pub device: u64,
    pub inode: u64,
    pub len: u64,
    modified: (i64, i64),
}

impl Fingerprint {
    pub(crate) fn of(file: &std::fs::File) -> std::io::Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        })
    }

    pub(crate) fn check(
        &self,
        file: &std::fs::File,
        path: &std::path::Path,
    ) -> Result<(), SourceError> {
        let path = path.to_path_buf();
        match Self::of(file) {
            Ok(now) if now == *self => Ok(()),
            Ok(now) => {
                let what = format!(
                    "{} bytes of {:?} became {} of {:?}",
                    self.len, self.modified, now.len, now.modified
                );
                Err(SourceError::Changed { path, what })
            }
            Err(source) => Err(SourceError::Open { path, source }),
        }
    }
}
