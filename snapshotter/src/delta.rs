//! What a VM changed: the difference between its memory and the chain of layers it was restored
//! from, written as one more layer.
//!
//! Pages that never faulted are holes in the guest's memfd and were not changed; pages that did
//! fault were read or written, and a comparison tells which. Where the memory file is mapped
//! privately, pages that were written are the process's own and no longer the file's, which the
//! kernel tells. The work grows with the pages in place, not with the size of the VM.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use uffd_handler::sealed_file::SealedFileError;
use uffd_handler::source::{
    DeltaSummary, DeltaWriter, LayerFiles, MemoryLayers, PageKind, RunKind, SourceError,
};

use crate::disk::for_each_extent;
use crate::mapped;

const PAGE: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];
/// Bytes of guest memory read at a time.
const CHUNK: usize = 1 << 20;

/// Why a delta could not be written.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// The chain below could not be read.
    #[error("memory the VM was restored from: {0}")]
    Source(#[from] SourceError),
    /// The guest's memory could not be read.
    #[error("guest memory: {0}")]
    Guest(std::io::Error),
    /// A mapped memory is one flat file at the bottom.
    #[error("the VM's memory is not mapped from a flat file")]
    NoFlatBase,
    /// The delta could not be written.
    #[error(transparent)]
    Write(#[from] SealedFileError),
}

/// Where a delta's index is: beside its data.
pub fn index_of(data: &Path) -> PathBuf {
    let mut name = data.as_os_str().to_owned();
    name.push(".index");
    name.into()
}

/// A delta as a layer.
pub fn layer(data: &Path) -> LayerFiles {
    LayerFiles::Delta { data: data.to_owned(), index: index_of(data) }
}

/// Writes what `guest` (a memfd, its VM paused) has that `layers` has not.
pub fn write(guest: &File, layers: &[LayerFiles], data: &Path) -> Result<DeltaSummary, DeltaError> {
    let length = guest.metadata().map_err(DeltaError::Guest)?.len();
    let below = MemoryLayers::open(layers, length)?;
    let mut writer = DeltaWriter::create(data, &index_of(data), length / PAGE as u64)?;
    let mut chunk = vec![0_u8; CHUNK];
    let mut was = [0_u8; PAGE];
    let mut failed = None;
    let walked = for_each_extent(guest, length, |start, end| {
        let mut at = start;
        while at < end {
            let n = CHUNK.min((end - at) as usize);
            guest.read_exact_at(&mut chunk[..n], at)?;
            for (i, page) in chunk[..n].chunks_exact(PAGE).enumerate() {
                let number = at / PAGE as u64 + i as u64;
                let done = add_if_changed(&mut writer, &below, number, page, &mut was);
                if let Err(e) = done {
                    failed = Some(e);
                    return Err(std::io::ErrorKind::Other.into());
                }
            }
            at += n as u64;
        }
        Ok(())
    });
    if let Some(e) = failed {
        return Err(e);
    }
    walked.map_err(DeltaError::Guest)?;
    Ok(writer.finish()?)
}

/// Writes what process `pid` (its VM paused) has in its private mapping of the memory file at the
/// bottom of `layers` that the file has not.
pub fn write_mapped(
    pid: i32,
    memory: &Path,
    layers: &[LayerFiles],
    data: &Path,
) -> Result<DeltaSummary, DeltaError> {
    let length = std::fs::metadata(memory).map_err(DeltaError::Guest)?.len();
    let below = MemoryLayers::open(layers, length)?;
    let mut writer = DeltaWriter::create(data, &index_of(data), length / PAGE as u64)?;
    let mut was = [0_u8; PAGE];
    let pages = mapped::PrivatePages::of(pid, memory).map_err(DeltaError::Guest)?;
    let mut failed = None;
    let walked = pages.for_each(|number, page| {
        add_if_changed(&mut writer, &below, number, page, &mut was).map_err(|e| {
            failed = Some(e);
            std::io::ErrorKind::Other.into()
        })
    });
    if let Some(e) = failed {
        return Err(e);
    }
    walked.map_err(DeltaError::Guest)?;
    Ok(writer.finish()?)
}

fn add_if_changed(
    writer: &mut DeltaWriter,
    below: &MemoryLayers,
    number: u64,
    page: &[u8],
    was: &mut [u8; PAGE],
) -> Result<(), DeltaError> {
    let same = match below.read_page(number, was)? {
        PageKind::Zero => *page == ZEROS,
        PageKind::Data => page == was,
    };
    if !same {
        writer.page(number, page)?;
    }
    Ok(())
}

/// Makes one delta of several on the same `base`, the last of them on top: keeps a chain short.
pub fn merge(
    base: &[LayerFiles],
    deltas: &[LayerFiles],
    memory_bytes: u64,
    data: &Path,
) -> Result<DeltaSummary, DeltaError> {
    let below = MemoryLayers::open(base, memory_bytes)?;
    let chain: Vec<LayerFiles> = base.iter().chain(deltas).cloned().collect();
    let whole = MemoryLayers::open(&chain, memory_bytes)?;
    let pages = memory_bytes / PAGE as u64;
    let mut writer = DeltaWriter::create(data, &index_of(data), pages)?;
    let (mut now, mut was) = ([0_u8; PAGE], [0_u8; PAGE]);
    let mut number = 0;
    while number < pages {
        let run = whole.run(number, pages - number);
        // What comes from below is as it was; no need to read it twice to see that.
        let from_below = match run.kind {
            RunKind::Read { layer, .. } => layer < base.len(),
            RunKind::Zero => below.run(number, run.pages) == run,
            RunKind::Mapped(_) => false,
        };
        if from_below {
            number += run.pages;
            continue;
        }
        for page in number..number + run.pages {
            let kind = whole.read_page(page, &mut now)?;
            let contents = if kind == PageKind::Zero { &ZEROS } else { &now };
            add_if_changed(&mut writer, &below, page, contents, &mut was)?;
        }
        number += run.pages;
    }
    Ok(writer.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn page(fill: u8) -> Vec<u8> {
        vec![fill; PAGE]
    }

    fn flat(dir: &Path, pages: u64) -> LayerFiles {
        let memory = dir.join("flat");
        let file = File::create_new(&memory).unwrap();
        file.set_len(pages * PAGE as u64).unwrap();
        for n in 0..pages / 2 {
            file.write_all_at(&page(n as u8 + 1), n * PAGE as u64).unwrap();
        }
        LayerFiles::Flat { memory, zero_map: None }
    }

    fn guest(pages: u64) -> File {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(pages * PAGE as u64).unwrap();
        file
    }

    fn read_all(layers: &[LayerFiles], pages: u64) -> Vec<Vec<u8>> {
        let layers = MemoryLayers::open(layers, pages * PAGE as u64).unwrap();
        let read = |n| {
            let mut buffer = page(0);
            match layers.read_page(n, &mut buffer).unwrap() {
                PageKind::Zero => page(0),
                PageKind::Data => buffer,
            }
        };
        (0..pages).map(read).collect()
    }

    #[test]
    fn only_changed_pages_are_written_and_deltas_merge() {
        let dir = tempfile::tempdir().unwrap();
        let pages = 64;
        let base = flat(dir.path(), pages);
        let first = guest(pages);
        first.write_all_at(&page(1), 0).unwrap(); // faulted in, unchanged
        first.write_all_at(&page(99), 3 * PAGE as u64).unwrap(); // changed
        first.write_all_at(&page(0), 5 * PAGE as u64).unwrap(); // became zero
        first.write_all_at(&page(0), 60 * PAGE as u64).unwrap(); // zero before and after
        first.write_all_at(&page(77), 61 * PAGE as u64).unwrap();
        let one = dir.path().join("one");
        let summary = write(&first, std::slice::from_ref(&base), &one).unwrap();
        assert_eq!((summary.data_pages, summary.zero_pages), (2, 1));

        let second = guest(pages);
        second.write_all_at(&page(42), 3 * PAGE as u64).unwrap(); // changed again
        second.write_all_at(&page(62), 61 * PAGE as u64).unwrap();
        second.write_all_at(&page(6), 5 * PAGE as u64).unwrap(); // back to what the base has
        let two = dir.path().join("two");
        write(&second, &[base.clone(), layer(&one)], &two).unwrap();

        let merged = dir.path().join("merged");
        let deltas = [layer(&one), layer(&two)];
        let bytes = pages * PAGE as u64;
        let summary = merge(std::slice::from_ref(&base), &deltas, bytes, &merged).unwrap();
        assert_eq!((summary.data_pages, summary.zero_pages), (2, 0));
        let chain = read_all(&[base.clone(), layer(&one), layer(&two)], pages);
        assert_eq!(chain, read_all(&[base, layer(&merged)], pages));
        assert_eq!(chain[3], page(42));
        assert_eq!(chain[5], page(6));
    }
}
