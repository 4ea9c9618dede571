//! The agent's own program in memory. Code that has not run yet is not mapped, perhaps not even read
//! from the disk; a clone would fetch it page by page while its host waits for the identity.

use std::ffi::c_void;
use std::fs;

/// Maps every page of the program that is not mapped yet. What this kernel cannot map ahead is
/// mapped when it is used, so trouble here is none.
pub fn populate() {
    let Ok(program) = fs::read_link("/proc/self/exe") else { return };
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return };
    let program = program.to_string_lossy();
    for line in maps.lines().filter(|line| line.ends_with(program.as_ref())) {
        let Some((start, end)) = range(line) else { continue };
        // SAFETY: reading a mapping of this process ahead changes nothing in it.
        unsafe { libc::madvise(start as *mut c_void, end - start, libc::MADV_POPULATE_READ) };
    }
}

/// The addresses a line of `/proc/self/maps` is about.
fn range(line: &str) -> Option<(usize, usize)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    let hex = |text| usize::from_str_radix(text, 16).ok();
    Some((hex(start)?, hex(end)?)).filter(|(start, end)| start < end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let line = "7fbdc34b6000-7fbdc34f0000 r-xp 00001000 fe:00 12   /usr/lib/rethaw/agent";
        assert_eq!(range(line), Some((0x7fbd_c34b_6000, 0x7fbd_c34f_0000)));
        assert_eq!(range(""), None);
        assert_eq!(range("2000-1000 r--p"), None);
    }

    #[test]
    fn the_whole_program_is_mapped() {
        populate();
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let program = fs::read_link("/proc/self/exe").unwrap();
        let program = program.to_string_lossy();
        let number = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
        let mut ours = false;
        let (mut size, mut resident) = (0, 0);
        for line in smaps.lines() {
            if range(line).is_some() {
                ours = line.ends_with(program.as_ref());
            } else if ours && line.starts_with("Size:") {
                size += number(line).unwrap();
            } else if ours && line.starts_with("Rss:") {
                resident += number(line).unwrap();
            }
        }
        assert!(size > 0 && resident == size, "{resident} of {size} KiB");
    }
}
