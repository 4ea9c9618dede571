//! What a VM changed: the difference between its memory, or its disk, and the chain of layers it was
//! restored from, written as one more layer.
//!
//! Memory: pages that never faulted are holes in the guest's memfd and were not changed; pages that
//! did fault were read or written, and a comparison tells which. Disks: what is compared are the
//! data extents of both sides and whatever the layers have. Either way the work grows with what was
//! touched, not with the size of the VM.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use uffd_handler::bitmap::Bitmap;
use uffd_handler::seal::{Key, KeySource};
use uffd_handler::sealed_file::SealedFileError;
use uffd_handler::source::{
    DeltaSummary, DeltaWriter, LayerFiles, Lookup, MemoryLayers, OpenLayer, PageSource, SourceError,
};

use crate::disk::for_each_extent;

const PAGE: usize = 4096;
/// Pages read at a time.
const CHUNK: u64 = 256;

/// Why a delta could not be written.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// The chain below could not be read.
    #[error("what the VM was restored from: {0}")]
    Source(#[from] SourceError),
    /// The guest's memory or disk could not be read.
    #[error("guest memory or disk: {0}")]
    Guest(std::io::Error),
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

/// A delta as a layer; `key` is the name of the key that it was written with.
pub fn layer(data: &Path, key: Option<&str>) -> LayerFiles {
    let (data, index) = (data.to_owned(), index_of(data));
    match key {
        None => LayerFiles::Delta { data, index },
        Some(key) => LayerFiles::EncryptedDelta { data, index, key: key.to_owned() },
    }
}

/// Writes what `guest` (a memfd, its VM paused) has that `below` has not.
pub fn write(
    guest: &File,
    below: &MemoryLayers,
    data: &Path,
    key: Option<&Key>,
) -> Result<DeltaSummary, DeltaError> {
    let length = guest.metadata().map_err(DeltaError::Guest)?.len();
    let mut touched = Vec::new();
    extents(guest, length, &mut |pages| touched.push(pages)).map_err(DeltaError::Guest)?;
    write_changed(guest, length, touched, below, data, key)
}

/// Writes what `disk` (no VM running on it) has that `below` has not; `base` is the flat file at the
/// bottom of `below`.
pub fn write_disk(
    disk: &File,
    base: &File,
    below: &MemoryLayers,
    data: &Path,
    key: Option<&Key>,
) -> Result<DeltaSummary, DeltaError> {
    let length = disk.metadata().map_err(DeltaError::Guest)?.len();
    let mut touched = Bitmap::new(length / PAGE as u64);
    for side in [disk, base] {
        extents(side, length, &mut |pages| pages.for_each(|page| touched.set(page)))
            .map_err(DeltaError::Guest)?;
    }
    for delta in below.deltas() {
        delta.entries().for_each(|(page, _)| touched.set(page));
    }
    write_changed(disk, length, touched.runs(), below, data, key)
}

/// Calls `f` with the pages of every data extent.
fn extents(file: &File, length: u64, f: &mut dyn FnMut(Range<u64>)) -> std::io::Result<()> {
    let page = PAGE as u64;
    for_each_extent(file, length, |start, end| {
        f(start / page..end.div_ceil(page));
        Ok(())
    })
}

fn write_changed(
    guest: &File,
    length: u64,
    touched: impl IntoIterator<Item = Range<u64>>,
    below: &MemoryLayers,
    data: &Path,
    key: Option<&Key>,
) -> Result<DeltaSummary, DeltaError> {
    let mut writer = DeltaWriter::create_with(data, &index_of(data), length / PAGE as u64, key)?;
    let room = CHUNK as usize * PAGE;
    let (mut now, mut was) = (vec![0; room], vec![0; room]);
    for pages in touched {
        let mut first = pages.start;
        while first < pages.end {
            let n = CHUNK.min(pages.end - first);
            let bytes = n as usize * PAGE;
            guest
                .read_exact_at(&mut now[..bytes], first * PAGE as u64)
                .map_err(DeltaError::Guest)?;
            below.read_pages(first, &mut was[..bytes])?;
            let both = now[..bytes].chunks_exact(PAGE).zip(was.chunks_exact(PAGE));
            for (i, (now, was)) in both.enumerate() {
                if now != was {
                    writer.page(first + i as u64, now)?;
                }
            }
            first += n;
        }
    }
    Ok(writer.finish()?)
}

/// Makes one delta of several on the same `base`, the last of them on top: keeps a chain short, and
/// puts all of it under one key.
pub fn merge(
    base: &[LayerFiles],
    deltas: &[LayerFiles],
    memory_bytes: u64,
    data: &Path,
    keys: &dyn KeySource,
    key: Option<&Key>,
) -> Result<DeltaSummary, DeltaError> {
    let below = MemoryLayers::open_with(base, memory_bytes, keys)?;
    let chain: Vec<LayerFiles> = base.iter().chain(deltas).cloned().collect();
    let whole = MemoryLayers::open_with(&chain, memory_bytes, keys)?;
    let mut upper = Bitmap::new(memory_bytes / PAGE as u64);
    for delta in whole.deltas().skip(below.deltas().count()) {
        delta.entries().for_each(|(page, _)| upper.set(page));
    }
    let mut writer =
        DeltaWriter::create_with(data, &index_of(data), memory_bytes / PAGE as u64, key)?;
    let (mut now, mut was) = ([0; PAGE], [0; PAGE]);
    for page in upper.runs().flatten() {
        whole.read_pages(page, &mut now)?;
        below.read_pages(page, &mut was)?;
        if now != was {
            writer.page(page, &now)?;
        }
    }
    Ok(writer.finish()?)
}

/// Writes the pages of `deltas`, bottom first, over a copy of the file they stand on.
pub fn apply(deltas: &[LayerFiles], target: &File, keys: &dyn KeySource) -> Result<(), DeltaError> {
    let length = target.metadata().map_err(DeltaError::Guest)?.len();
    let mut room = vec![0; CHUNK as usize * PAGE];
    for files in deltas {
        let delta = OpenLayer::open(files, length, keys)?;
        let OpenLayer::Delta(delta) = &delta else { continue };
        let mut entries = delta.entries().peekable();
        while let Some((first, found)) = entries.next() {
            let mut pages = 1;
            while pages < CHUNK
                && entries.next_if(|next| follows((first, found), pages, *next)).is_some()
            {
                pages += 1;
            }
            let bytes = pages as usize * PAGE;
            let at = first * PAGE as u64;
            match found {
                Lookup::At(place) => {
                    delta.read(place, first, &mut room[..bytes])?;
                    target.write_all_at(&room[..bytes], at).map_err(DeltaError::Guest)?;
                }
                Lookup::Zero | Lookup::Absent => {
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(target, flags, at, bytes as u64)
                        .map_err(|e| DeltaError::Guest(e.into()))?;
                }
            }
        }
    }
    Ok(())
}

/// Whether `next` is what comes `pages` after an entry, to be had in the same go.
fn follows((page, found): (u64, Lookup), pages: u64, next: (u64, Lookup)) -> bool {
    next.0 == page + pages
        && match (found, next.1) {
            (Lookup::At(place), Lookup::At(after)) => after == place + pages,
            (found, after) => found == after,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use uffd_handler::seal::{NoKeys, SealError};
    use uffd_handler::source::PageKind;

    /// One key, whatever it is called.
    #[derive(Debug)]
    struct OneKey(Key);

    impl KeySource for OneKey {
        fn key(&self, _id: &str) -> Result<Key, SealError> {
            Ok(self.0.clone())
        }
    }

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

    fn read_all(layers: &[LayerFiles], pages: u64, keys: &dyn KeySource) -> Vec<Vec<u8>> {
        let layers = MemoryLayers::open_with(layers, pages * PAGE as u64, keys).unwrap();
        let read = |n| {
            let mut buffer = page(0);
            match layers.read_page(n, &mut buffer).unwrap() {
                PageKind::Zero => page(0),
                PageKind::Data => buffer,
            }
        };
        let one_by_one: Vec<_> = (0..pages).map(read).collect();
        let mut at_once = vec![9; pages as usize * PAGE];
        layers.read_pages(0, &mut at_once).unwrap();
        assert_eq!(at_once, one_by_one.concat());
        one_by_one
    }

    fn changes_are_written_and_merge(keys: &dyn KeySource, key: Option<&Key>) {
        let dir = tempfile::tempdir().unwrap();
        let (pages, bytes) = (64, 64 * PAGE as u64);
        let name = key.map(|_| "key");
        let base = flat(dir.path(), pages);
        let open = |layers: &[LayerFiles]| MemoryLayers::open_with(layers, bytes, keys).unwrap();
        let first = guest(pages);
        first.write_all_at(&page(1), 0).unwrap(); // faulted in, unchanged
        first.write_all_at(&page(99), 3 * PAGE as u64).unwrap(); // changed
        first.write_all_at(&page(0), 5 * PAGE as u64).unwrap(); // became zero
        first.write_all_at(&page(0), 60 * PAGE as u64).unwrap(); // zero before and after
        first.write_all_at(&page(77), 61 * PAGE as u64).unwrap();
        let one = dir.path().join("one");
        let summary = write(&first, &open(std::slice::from_ref(&base)), &one, key).unwrap();
        assert_eq!((summary.data_pages, summary.zero_pages), (2, 1));

        let second = guest(pages);
        second.write_all_at(&page(42), 3 * PAGE as u64).unwrap(); // changed again
        second.write_all_at(&page(62), 61 * PAGE as u64).unwrap();
        second.write_all_at(&page(6), 5 * PAGE as u64).unwrap(); // back to what the base has
        let two = dir.path().join("two");
        write(&second, &open(&[base.clone(), layer(&one, name)]), &two, key).unwrap();

        let merged = dir.path().join("merged");
        let deltas = [layer(&one, name), layer(&two, name)];
        let below = std::slice::from_ref(&base);
        let summary = merge(below, &deltas, bytes, &merged, keys, key).unwrap();
        assert_eq!((summary.data_pages, summary.zero_pages), (2, 0));
        let chain = read_all(&[base.clone(), layer(&one, name), layer(&two, name)], pages, keys);
        assert_eq!(chain, read_all(&[base, layer(&merged, name)], pages, keys));
        assert_eq!(chain[3], page(42));
        assert_eq!(chain[5], page(6));
        let stored = std::fs::read(&two).unwrap();
        assert_eq!(stored.windows(64).any(|w| w == [42; 64]), key.is_none());
    }

    #[test]
    fn only_changed_pages_are_written_and_deltas_merge() {
        changes_are_written_and_merge(&NoKeys, None);
    }

    #[test]
    fn encrypted_ones_do_the_same_and_need_their_key() {
        let keys = OneKey(Key::generate().unwrap());
        changes_are_written_and_merge(&keys, Some(&keys.0));

        let dir = tempfile::tempdir().unwrap();
        let base = flat(dir.path(), 8);
        let changed = guest(8);
        changed.write_all_at(&page(99), 3 * PAGE as u64).unwrap();
        let data = dir.path().join("delta");
        let below = MemoryLayers::open(std::slice::from_ref(&base), 8 * PAGE as u64).unwrap();
        write(&changed, &below, &data, Some(&keys.0)).unwrap();
        let chain = [base, layer(&data, Some("key"))];
        let open = |keys: &dyn KeySource| MemoryLayers::open_with(&chain, 8 * PAGE as u64, keys);
        assert!(open(&NoKeys).is_err());
        assert!(open(&OneKey(Key::generate().unwrap())).is_err());
        open(&keys).unwrap().read_page(3, &mut page(0)).unwrap();
        // A bit that changed on disk is an error, not another page.
        let file = File::options().write(true).open(&data).unwrap();
        let mut byte = [0];
        file.write_all_at(&byte, 70).unwrap();
        byte[0] = 1;
        file.write_all_at(&byte, 71).unwrap();
        assert!(open(&keys).unwrap().read_page(3, &mut page(0)).is_err());
    }

    #[test]
    fn a_disk_is_its_base_and_its_deltas() {
        let dir = tempfile::tempdir().unwrap();
        let keys = OneKey(Key::generate().unwrap());
        let (pages, bytes) = (64, 64 * PAGE as u64);
        let base = flat(dir.path(), pages);
        let LayerFiles::Flat { memory: base_path, .. } = &base else { unreachable!() };
        let copy = |to: &str| {
            let to = dir.path().join(to);
            crate::disk::clone_file(base_path, &to).unwrap();
            File::options().read(true).write(true).open(to).unwrap()
        };
        let disk = copy("disk");
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let mut deltas: Vec<LayerFiles> = Vec::new();
        for (round, change) in [(4, 50), (5, 51), (6, 4)] {
            disk.write_all_at(&page(200 + round), round as u64 * PAGE as u64).unwrap();
            disk.write_all_at(&[round; 3 * PAGE], change * PAGE as u64).unwrap();
            fallocate(&disk, punch, 9 * PAGE as u64, round as u64 * PAGE as u64).unwrap();
            let below: Vec<_> = std::iter::once(&base).chain(&deltas).cloned().collect();
            let below = MemoryLayers::open_with(&below, bytes, &keys).unwrap();
            let data = dir.path().join(format!("delta{round}"));
            let flat = File::open(base_path).unwrap();
            let summary = write_disk(&disk, &flat, &below, &data, Some(&keys.0)).unwrap();
            assert!(summary.data_pages <= 4, "round {round}: {summary:?}");
            deltas.push(layer(&data, Some("key")));
            let again = copy(&format!("again{round}"));
            apply(&deltas, &again, &keys).unwrap();
            let read = |file: &File| {
                let mut all = vec![0; bytes as usize];
                file.read_exact_at(&mut all, 0).unwrap();
                all
            };
            assert!(read(&disk) == read(&again), "round {round}");
        }
        let merged = dir.path().join("merged");
        let below = std::slice::from_ref(&base);
        merge(below, &deltas, bytes, &merged, &keys, Some(&keys.0)).unwrap();
        let chain: Vec<_> = below.iter().chain(&deltas).cloned().collect();
        let one = [base.clone(), layer(&merged, Some("key"))];
        assert_eq!(read_all(&chain, pages, &keys), read_all(&one, pages, &keys));
    }
}
