//! The command line that others see: of a process that was told late what to be, the kernel would
//! go on showing what it was started with.

use std::ffi::c_char;

/// The kernel's `struct prctl_mm_map`.
#[repr(C)]
#[derive(Default)]
struct MemoryMap {
    start_code: u64,
    end_code: u64,
    start_data: u64,
    end_data: u64,
    start_brk: u64,
    brk: u64,
    start_stack: u64,
    arg_start: u64,
    arg_end: u64,
    env_start: u64,
    env_end: u64,
    auxv: u64,
    auxv_size: u32,
    exe_fd: u32,
}

/// Has `ps` show what is between the two places in memory. A kernel that does not let itself be told
/// (one without `CONFIG_CHECKPOINT_RESTORE`) shows what it showed before.
pub(crate) fn show(start: *const c_char, end: *const c_char) {
    let Some(mut map) = current() else { return };
    (map.arg_start, map.arg_end) = (start as u64, end as u64);
    let size = size_of::<MemoryMap>();
    // SAFETY: the structure is the one this call reads, and of the size given.
    unsafe {
        libc::prctl(libc::PR_SET_MM, libc::PR_SET_MM_MAP, &raw const map, size, 0);
    }
}

/// What the kernel has now; see proc(5) for the numbers of the fields.
fn current() -> Option<MemoryMap> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name before the parenthesis may hold anything.
    let (_, after) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = after.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(MemoryMap {
        start_code: field(26)?,
        end_code: field(27)?,
        start_stack: field(28)?,
        start_data: field(45)?,
        end_data: field(46)?,
        start_brk: field(47)?,
        // SAFETY: an integer.
        brk: unsafe { libc::sbrk(0) } as u64,
        env_start: field(50)?,
        env_end: field(51)?,
        exe_fd: u32::MAX,
        ..MemoryMap::default()
    })
}
