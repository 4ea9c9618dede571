//! A file system with one memory file whose reads are slow or fail on demand.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, FileAttr, FileType, Filesystem, MountOption, ReplyAttr, ReplyData,
    ReplyEntry, ReplyOpen, Request,
};

use super::oracle;

const TTL: Duration = Duration::from_secs(60);
const FILE: u64 = 2;

/// What the file system does to reads.
#[derive(Debug, Default)]
pub struct Trouble {
    /// Delay of each read.
    pub millis: AtomicU64,
    /// Reads that fail from now on.
    pub errors: AtomicU32,
}

struct SlowFs {
    trouble: Arc<Trouble>,
    seed: u64,
    pages: u64,
}

impl SlowFs {
    fn attributes(&self, inode: u64) -> FileAttr {
        let kind = if inode == FILE { FileType::RegularFile } else { FileType::Directory };
        FileAttr {
            ino: inode,
            size: self.pages * 4096,
            blocks: self.pages * 8,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o755,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for SlowFs {
    fn lookup(&mut self, _: &Request<'_>, _: u64, name: &OsStr, reply: ReplyEntry) {
        if name == "memory" {
            reply.entry(&TTL, &self.attributes(FILE), 0);
        } else {
            reply.error(libc::ENOENT);
        }
    }

    fn getattr(&mut self, _: &Request<'_>, inode: u64, _: Option<u64>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn open(&mut self, _: &Request<'_>, _: u64, _: i32, reply: ReplyOpen) {
        reply.opened(0, 0);
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        _: u64,
        _: u64,
        offset: i64,
        size: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyData,
    ) {
        let (trouble, seed, pages) = (self.trouble.clone(), self.seed, self.pages);
        // Slow reads of one page are not to hold up those of another.
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(trouble.millis.load(Ordering::Relaxed)));
            let fail = trouble
                .errors
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            if fail.is_ok() {
                return reply.error(libc::EIO);
            }
            let first = offset as u64 / 4096;
            let last = (first + u64::from(size) / 4096).min(pages);
            let bytes: Vec<u8> =
                (first..last).flat_map(|page| oracle::template(seed, page)).collect();
            reply.data(&bytes);
        });
    }
}

/// Mounts one; gone when the session is dropped.
pub fn mount(at: &Path, seed: u64, pages: u64) -> (BackgroundSession, Arc<Trouble>) {
    let trouble = Arc::new(Trouble::default());
    let fs = SlowFs { trouble: trouble.clone(), seed, pages };
    let options = [MountOption::RO, MountOption::FSName("rethaw-test".into())];
    (fuser::spawn_mount2(fs, at, &options).unwrap(), trouble)
}
