//! Whether pages of a mapped file are in memory: asked before an install, because reading them in
//! would be waited for with everybody else locked out.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat, geteuid};

use crate::uffd::PAGE;

/// Pages asked about per call: as many as a batch has.
const PAGES: usize = 512;

/// Whether the kernel tells us which pages of the file are in memory. To those who neither own nor
/// may write it, it says that all are.
pub(super) fn is_told(file: &File) -> bool {
    let owned = file.metadata().is_ok_and(|meta| meta.uid() == geteuid().as_raw());
    owned || {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        faccessat(AT_FDCWD, path.as_str(), AccessFlags::W_OK, AtFlags::AT_EACCESS).is_ok()
    }
}

/// Whether all pages of this part of a mapping are in memory, as far as [`is_told`]; no when the kernel
/// does not say. It says nothing of a file's end: memory may go on behind it.
///
/// For pages that are mapped already this costs a thirtieth of `MADV_POPULATE_READ`, which looks each
/// of them up as a fault would.
pub(super) fn is_resident(start: *const u8, len: usize) -> bool {
    let mut found = [0_u8; PAGES];
    let step = PAGES * PAGE as usize;
    (0..len).step_by(step).all(|at| {
        let part = step.min(len - at);
        let found = &mut found[..part.div_ceil(PAGE as usize)];
        // SAFETY: `found` has a byte for each page. The kernel touches nothing in the range, and
        // reports an error where nothing is mapped.
        let done =
            unsafe { libc::mincore(start.wrapping_add(at) as *mut _, part, found.as_mut_ptr()) };
        done == 0 && found.iter().all(|page| page & 1 == 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapOptions;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_page_that_would_have_to_be_read_is_noticed() {
        let file = tempfile::tempfile().unwrap();
        let pages = 3 * PAGES as u64;
        // What was never written or read is in nobody's memory.
        file.set_len(pages * PAGE).unwrap();
        file.write_all_at(&vec![7; (pages - 1) as usize * 4096], 0).unwrap();
        assert!(is_told(&file));
        let mapping = MmapOptions::new().map_raw_read_only(&file).unwrap();
        let resident = |pages: u64| is_resident(mapping.as_ptr(), (pages * PAGE) as usize);
        assert!(resident(pages - 1));
        assert!(!resident(pages));
    }

    #[test]
    fn no_answer_is_a_no() {
        assert!(!is_resident(std::ptr::null(), 4096), "nothing is mapped there");
    }
}
