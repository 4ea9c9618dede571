//! The pages of a privately mapped file that a process has changed, and so has for itself.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

const PAGE: u64 = 4096;
/// Entries of `pagemap` read at a time.
const CHUNK: u64 = 4096;

/// Bits of an entry of `/proc/<pid>/pagemap`.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;

/// One mapping of the file.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    /// First page of the file in it.
    page: u64,
}

/// Access to the changed pages of one process that stands still.
#[derive(Debug)]
pub struct PrivatePages {
    mappings: Vec<Mapping>,
    pagemap: File,
    memory: File,
}

impl PrivatePages {
    /// Of process `pid` and `file`, which it maps at least once.
    pub fn of(pid: i32, file: &Path) -> io::Result<Self> {
        let of_process = |name: &str| File::open(format!("/proc/{pid}/{name}"));
        let wanted = Wanted::new(file)?;
        let maps = io::read_to_string(of_process("maps")?)?;
        let mappings: Vec<_> = maps.lines().filter_map(|line| mapping(line, &wanted)).collect();
        if mappings.is_empty() {
            let what = format!("process {pid} has no private mapping of {}", file.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, what));
        }
        Ok(Self { mappings, pagemap: of_process("pagemap")?, memory: of_process("mem")? })
    }

    /// Calls with number (in the file) and contents of each changed page.
    pub fn for_each(&self, mut found: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut entries = vec![0_u8; (CHUNK * 8) as usize];
        let mut page = vec![0_u8; PAGE as usize];
        for mapping in &self.mappings {
            let count = (mapping.end - mapping.start) / PAGE;
            let mut done = 0;
            while done < count {
                let n = CHUNK.min(count - done);
                let first = mapping.start / PAGE + done;
                let room = &mut entries[..(n * 8) as usize];
                self.pagemap.read_exact_at(room, first * 8)?;
                for (i, entry) in room.chunks_exact(8).enumerate() {
                    let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
                    let own = entry & PRESENT != 0 && entry & OF_A_FILE == 0;
                    if own || entry & SWAPPED != 0 {
                        self.memory.read_exact_at(&mut page, (first + i as u64) * PAGE)?;
                        found(mapping.page + done + i as u64, &page)?;
                    }
                }
                done += n;
            }
        }
        Ok(())
    }
}

/// What a line about the file has. On btrfs and overlayfs the device is another than `stat` says;
/// then the path decides.
struct Wanted {
    device: u64,
    inode: u64,
    path: String,
}

impl Wanted {
    fn new(file: &Path) -> io::Result<Self> {
        let meta = std::fs::metadata(file)?;
        let path = file.canonicalize()?.to_string_lossy().into_owned();
        Ok(Self { device: meta.dev(), inode: meta.ino(), path })
    }
}

/// A line of `/proc/<pid>/maps`, if it is a private mapping of that file.
fn mapping(line: &str, wanted: &Wanted) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (range, rights, offset) = (fields.next()?, fields.next()?, fields.next()?);
    let (major, minor) = fields.next()?.split_once(':')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let here = rustix::fs::makedev(hex(major)? as u32, hex(minor)? as u32);
    let inode = fields.next()?.parse() == Ok(wanted.inode);
    let same = inode && (here == wanted.device || line.ends_with(&wanted.path));
    let (start, end) = range.split_once('-')?;
    let mapping = Mapping { start: hex(start)?, end: hex(end)?, page: hex(offset)? / PAGE };
    (same && rights.ends_with('p')).then_some(mapping)
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapOptions;

    #[test]
    #[expect(unsafe_code, reason = "mapping a file is")]
    fn only_what_was_written_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        std::fs::write(&path, vec![7; 64 * PAGE as usize]).unwrap();
        let file = File::open(&path).unwrap();
        let pid = std::process::id() as i32;
        assert!(PrivatePages::of(pid, &path).is_err(), "not mapped yet");
        // SAFETY: nobody changes the file.
        let mut map = unsafe { MmapOptions::new().offset(4 * PAGE).map_copy(&file) }.unwrap();
        let read: u64 = map.iter().map(|byte| u64::from(*byte)).sum();
        assert_eq!(read, 60 * PAGE * 7, "every page was read");
        for page in [0, 9, 10, 59] {
            map[page * PAGE as usize + 5] = page as u8;
        }
        let mut found = Vec::new();
        PrivatePages::of(pid, &path)
            .unwrap()
            .for_each(|number, page| {
                found.push((number, page[4], page[5]));
                Ok(())
            })
            .unwrap();
        assert_eq!(found, [(4, 7, 0), (13, 7, 9), (14, 7, 10), (63, 7, 59)]);
    }
}
