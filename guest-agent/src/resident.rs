//! The agent in memory: its program, its heap and its stack. Code that has not run yet is not mapped,
//! perhaps not even read from the disk, and memory that was not used yet is not there; a clone would
//! fetch either page by page while its host waits for the identity.

use std::ffi::c_void;
use std::fs;
use std::hint::black_box;

/// Memory that is kept at hand at the end of the heap.
const HEAP: usize = 512 << 10;
/// Free memory there is only given back beyond this.
const KEPT: i32 = 8 << 20;
/// How deep an identity may call.
const STACK: usize = 64 << 10;

/// Has the heap grow in large steps, and keep what it has.
pub fn keep_heap() {
    // SAFETY: both only set numbers that the allocator looks at later.
    unsafe {
        libc::mallopt(libc::M_TOP_PAD, HEAP as i32);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Maps every page of the program, the heap and the stack that is not mapped yet. What this kernel
/// cannot map ahead is mapped when it is used, so trouble here is none.
pub fn populate() {
    deepen();
    let Ok(program) = fs::read_link("/proc/self/exe") else { return };
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return };
    let program = program.to_string_lossy();
    for line in maps.lines() {
        let advice = if line.ends_with(program.as_ref()) {
            libc::MADV_POPULATE_READ
        } else if line.ends_with("[heap]") || line.ends_with("[stack]") {
            libc::MADV_POPULATE_WRITE
        } else {
            continue;
        };
        let Some((start, end)) = range(line) else { continue };
        // SAFETY: mapping pages of this process ahead changes nothing in them.
        unsafe { libc::madvise(start as *mut c_void, end - start, advice) };
    }
}

/// Grows the stack.
#[inline(never)]
fn deepen() {
    black_box(&mut [0u8; STACK]);
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
    fn the_whole_program_is_mapped_and_the_heap() {
        keep_heap();
        populate();
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let program = fs::read_link("/proc/self/exe").unwrap();
        let program = program.to_string_lossy();
        let number = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
        let mut ours = false;
        let (mut size, mut resident, mut heaps) = (0, 0, 0);
        for line in smaps.lines() {
            if range(line).is_some() {
                let heap = line.ends_with("[heap]");
                ours = heap || line.ends_with(program.as_ref());
                heaps += u32::from(heap);
            } else if ours && line.starts_with("Size:") {
                size += number(line).unwrap();
            } else if ours && line.starts_with("Rss:") {
                resident += number(line).unwrap();
            }
        }
        assert!(size > 0 && heaps == 1 && resident == size, "{resident} of {size} KiB");
    }
}
