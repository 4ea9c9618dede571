//! What must outlive a page server: one piece of shared memory per VM, held by the service and by
//! whichever page server is serving.
//!
//! It says which pages were put in place, which the VMM gave back, which were asked for, and how
//! often what happened. Because of it a page server may be killed at any instruction: a page gets
//! its saved contents once, and whoever finds it missing again gets zeros, since only the VMM can
//! have taken it away.
//!
//! The kernel's messages are read into it too. A VMM that gives pages back goes on as soon as its
//! message is taken out of the kernel's queue, which is inside of `read(2)`, before any instruction
//! of the reader can note it. A message in private memory would die with its reader, and a page
//! that was given back before it was ever in place would get its saved contents. Here it is found
//! by the next page server. (A process that is killed inside of `read(2)` finishes that call.)

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use thiserror::Error;

use crate::bitmap::{Bitmap, SharedBitmap, words_for};
use crate::region::RegionMap;
use crate::stats::{COUNTERS, Counter, LATENCY_BUCKETS, Stats, latency_bucket};
use crate::uffd::{Message, MessageSlot};

const MAGIC: u64 = u64::from_le_bytes(*b"RTHWVS02");
/// Bytes before the bitmaps.
const HEADER_BYTES: usize = 4096;
/// Where the messages are in them.
const MESSAGES_AT: usize = HEADER_BYTES - MESSAGES * size_of::<MessageSlot>();
/// Messages that one read takes at most.
pub const MESSAGES: usize = 64;
const BITMAPS: usize = 3;

/// Why there is no shared state.
#[derive(Debug, Error)]
pub enum VmStateError {
    /// A system call failed.
    #[error("shared state of a VM: {call}: {source}")]
    System {
        /// The call.
        call: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The memory is not a state of this version for this memory size.
    #[error("shared state of a VM: {0}")]
    Unusable(String),
}

#[repr(C)]
struct Header {
    magic: AtomicU64,
    pages: AtomicU64,
    recording: AtomicU32,
    /// 0 while the working set is being put in place, then 1; a futex word.
    prefetched: AtomicU32,
    graduated: AtomicU32,
    handovers: AtomicU32,
    counters: [AtomicU64; COUNTERS],
    latency: [AtomicU64; LATENCY_BUCKETS],
}

/// The shared state of one VM.
#[derive(Debug)]
pub struct VmState {
    fd: OwnedFd,
    mapping: MmapRaw,
    pages: u64,
}

impl VmState {
    /// Makes the state of a VM that nobody has served yet.
    pub fn create(pages: u64, recording: bool) -> Result<Self, VmStateError> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create("rethaw-vm-state", flags).map_err(system("memfd_create"))?;
        let file = File::from(fd);
        Self::size(&file, pages)?;
        // Sealed, so that no holder can turn another's access into a SIGBUS.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(system("F_ADD_SEALS"))?;
        Self::begin(file, pages, recording)
    }

    /// As [`VmState::create`], in a file that outlives all holders. It belongs on a file system in
    /// memory: writing it must never wait for a disk.
    pub fn create_at(path: &Path, pages: u64, recording: bool) -> Result<Self, VmStateError> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let file =
            options.open(path).map_err(|source| VmStateError::System { call: "open", source })?;
        Self::size(&file, pages)?;
        Self::begin(file, pages, recording)
    }

    fn size(file: &File, pages: u64) -> Result<(), VmStateError> {
        file.set_len(bytes_for(pages) as u64)
            .map_err(|source| VmStateError::System { call: "ftruncate", source })
    }

    fn begin(file: File, pages: u64, recording: bool) -> Result<Self, VmStateError> {
        let state = Self::map(file.into(), pages)?;
        let header = state.header();
        header.pages.store(pages, Ordering::Relaxed);
        header.recording.store(u32::from(recording), Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        Ok(state)
    }

    /// Maps a state that came from another process.
    pub fn open(fd: OwnedFd, pages: u64) -> Result<Self, VmStateError> {
        let file = File::from(fd);
        let meta =
            file.metadata().map_err(|source| VmStateError::System { call: "fstat", source })?;
        let len = meta.len();
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).unwrap_or(0);
        let sealed = SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK);
        // A file with a name cannot be sealed; then nobody else may be able to cut it.
        let private = meta.uid() == nix::unistd::geteuid().as_raw() && meta.mode() & 0o077 == 0;
        let safe = sealed || (private && meta.nlink() > 0);
        if len != bytes_for(pages) as u64 || !safe {
            return Err(VmStateError::Unusable(format!("{len} bytes, safe: {safe}")));
        }
        let state = Self::map(file.into(), pages)?;
        let header = state.header();
        let (magic, held) =
            (header.magic.load(Ordering::Acquire), header.pages.load(Ordering::Relaxed));
        if magic != MAGIC || held != pages {
            return Err(VmStateError::Unusable(format!("magic {magic:x}, {held} pages")));
        }
        Ok(state)
    }

    fn map(fd: OwnedFd, pages: u64) -> Result<Self, VmStateError> {
        let file = File::from(fd);
        let mapping = MmapOptions::new()
            .len(bytes_for(pages))
            .map_raw(&file)
            .map_err(|source| VmStateError::System { call: "mmap", source })?;
        // SAFETY: the mapping is at least as long; locking changes nothing in it.
        let locked = unsafe { libc::mlock(mapping.as_ptr().cast(), HEADER_BYTES) };
        if locked != 0 {
            // The kernel writes messages there: a page that has to come from swap first could make
            // it fail in a process that is being killed, and only then.
            let error = std::io::Error::last_os_error();
            tracing::debug!(%error, "the header of a VM's shared state can be swapped out");
        }
        Ok(Self { fd: file.into(), mapping, pages })
    }

    /// Another descriptor of the same memory.
    pub fn descriptor(&self) -> Result<OwnedFd, VmStateError> {
        self.fd
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| VmStateError::System { call: "dup", source })
    }

    fn header(&self) -> &Header {
        const { assert!(size_of::<Header>() <= MESSAGES_AT) };
        // SAFETY: the mapping is at least this long, page aligned, lives as long as `self` and
        // cannot shrink; the header consists of atomics only, for which any bits are valid.
        unsafe { &*self.mapping.as_ptr().cast::<Header>() }
    }

    /// Where messages of the VM's userfaultfd are to be read to; by one thread only.
    pub fn messages(&self) -> &[MessageSlot; MESSAGES] {
        // SAFETY: as in `header`; the slots lie behind it in the same page, aligned, and consist of
        // atomics only.
        unsafe { &*self.mapping.as_ptr().add(MESSAGES_AT).cast() }
    }

    /// Notes what the VMM gave back according to these messages; returns how often it did.
    pub fn note_removes(&self, messages: &[MessageSlot], regions: &RegionMap) -> u64 {
        let mut count = 0;
        for message in messages {
            if let Message::Remove { start, end } = message.decode() {
                for pages in regions.pages_in(start, end) {
                    self.removed().set_range(pages);
                }
                count += 1;
            }
        }
        count
    }

    fn bitmap(&self, index: usize) -> SharedBitmap<'_> {
        let words = words_for(self.pages);
        // SAFETY: as in `header`; `bytes_for` counts in all the bitmaps.
        let memory = unsafe {
            let start = self.mapping.as_ptr().add(HEADER_BYTES).cast::<AtomicU64>();
            std::slice::from_raw_parts(start.add(index * words), words)
        };
        SharedBitmap::new(self.pages, memory)
    }

    /// Pages of the guest's memory.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that were put in place once.
    pub fn present(&self) -> SharedBitmap<'_> {
        self.bitmap(0)
    }

    /// Pages the VMM gave back.
    pub fn removed(&self) -> SharedBitmap<'_> {
        self.bitmap(1)
    }

    /// Pages that were asked for while recording.
    pub fn recorded(&self) -> SharedBitmap<'_> {
        self.bitmap(2)
    }

    /// Whether demand faults are being recorded.
    pub fn is_recording(&self) -> bool {
        self.header().recording.load(Ordering::Relaxed) != 0
    }

    /// Ends the recording and gives its pages.
    pub fn stop_recording(&self) -> Bitmap {
        self.header().recording.store(0, Ordering::Relaxed);
        self.recorded().snapshot()
    }

    /// Whether the VM no longer needs a page server.
    pub fn is_graduated(&self) -> bool {
        self.header().graduated.load(Ordering::Acquire) != 0
    }

    /// Notes that the VM no longer needs a page server.
    pub fn set_graduated(&self) {
        self.header().graduated.store(1, Ordering::Release);
    }

    /// Counts a page server that begins to serve the VM; true from the second one on.
    pub fn begin_service(&self) -> bool {
        let taken_over = self.header().handovers.fetch_add(1, Ordering::AcqRel) > 0;
        self.count(Counter::Takeovers, u64::from(taken_over));
        taken_over
    }

    /// Adds to a counter.
    pub fn count(&self, counter: Counter, amount: u64) {
        if amount > 0 {
            self.header().counters[counter as usize].fetch_add(amount, Ordering::Relaxed);
        }
    }

    /// Counts one answered fault's time.
    pub fn count_latency(&self, nanos: u64) {
        self.count(Counter::FaultNanos, nanos);
        self.header().latency[latency_bucket(nanos)].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts so far.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        let header = self.header();
        stats.set(&std::array::from_fn(|i| header.counters[i].load(Ordering::Relaxed)));
        stats.latency_buckets = std::array::from_fn(|i| header.latency[i].load(Ordering::Relaxed));
        stats
    }

    /// Says that the working set is in place, or that there is none to wait for.
    pub fn set_prefetched(&self) {
        let word = &self.header().prefetched;
        word.store(1, Ordering::Release);
        // SAFETY: the word lies in mapped memory; FUTEX_WAKE takes no other pointer.
        unsafe {
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
        }
    }

    /// Waits until the working set is in place; false when the time runs out first.
    pub fn wait_prefetched(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        let word = &self.header().prefetched;
        while word.load(Ordering::Acquire) == 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let time = libc::timespec {
                tv_sec: left.as_secs() as libc::time_t,
                tv_nsec: libc::c_long::from(left.subsec_nanos()),
            };
            // SAFETY: word and timespec outlive the call. Any outcome leads back to the check.
            unsafe {
                libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, 0, &raw const time);
            }
        }
        true
    }
}

fn bytes_for(pages: u64) -> usize {
    (HEADER_BYTES + BITMAPS * words_for(pages) * 8).next_multiple_of(4096)
}

fn system(call: &'static str) -> impl Fn(Errno) -> VmStateError {
    move |errno| VmStateError::System { call, source: errno.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_holders_see_the_same() {
        let mine = VmState::create(1000, true).unwrap();
        let theirs = VmState::open(mine.descriptor().unwrap(), 1000).unwrap();
        theirs.removed().set_range(63..130);
        theirs.recorded().set_range(5..6);
        theirs.count(Counter::Removes, 2);
        theirs.count_latency(3_000);
        assert!(mine.removed().get(129) && !mine.removed().get(130) && !mine.present().get(64));
        assert!(mine.is_recording());
        assert_eq!(mine.stop_recording().runs().next(), Some(5..6));
        assert!(!theirs.is_recording());
        assert_eq!((mine.stats().removes, mine.stats().latency_buckets[2]), (2, 1));
        assert!(!mine.begin_service());
        assert!(theirs.begin_service());
        assert!(VmState::open(mine.descriptor().unwrap(), 100_000).is_err());
    }

    #[test]
    fn waiting_for_the_working_set_ends_either_way() {
        let state = VmState::create(10, false).unwrap();
        assert!(!state.wait_prefetched(Duration::from_millis(20)));
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(state.wait_prefetched(Duration::from_secs(20))));
            state.set_prefetched();
        });
    }

    #[test]
    fn an_unsealed_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes_for(10) as u64).unwrap();
        assert!(VmState::open(file.into(), 10).is_err());
    }
}
