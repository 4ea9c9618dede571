//! A guest without an operating system: it fills memory with a pattern, then checks it round by
//! round and says so on the serial port.
//!
//! ```text
//!   'R'   filled, rounds begin
//!   '.'   one round: every pattern page whole, every zero page zero, every counter page as high as
//!         the round counter, which lives in a register; then the counters go up by one
//!   'X'   something was wrong; nothing follows
//! ```
//!
//! So a guest whose memory and device state are not of the same instant cannot print a dot.

use std::path::Path;

/// Page that follows another: the pattern pages, each followed by a page of zeros.
pub const PATTERN_PAGES: u64 = 128;
/// Pages written in each round.
pub const COUNTER_PAGES: u64 = 32;
/// Where pattern pages begin.
pub const PATTERN_AT: u64 = 0x200_0000;
/// Where counter pages begin.
pub const COUNTERS_AT: u64 = 0x300_0000;
/// What the first pattern page is full of; each next one has one more.
pub const PATTERN: u64 = 0x7e7a_0000_dead_0001;

const LOAD_AT: u64 = 0x100_0000;

std::arch::global_asm!(
    ".globl rethaw_test_guest",
    ".globl rethaw_test_guest_end",
    "rethaw_test_guest:",
    "cld",
    "mov edi, {pattern_at}",
    "movabs rax, {pattern}",
    "mov ebx, {pattern_pages}",
    "2: mov ecx, 512",
    "rep stosq",
    "add rdi, 4096",
    "inc rax",
    "dec ebx",
    "jnz 2b",
    "mov edi, {counters_at}",
    "mov ebx, {counter_pages}",
    "3: mov qword ptr [rdi], 0",
    "add rdi, 4096",
    "dec ebx",
    "jnz 3b",
    "xor r12d, r12d",
    "mov edx, 0x3f8",
    "mov al, 'R'",
    "out dx, al",
    "4:", // a round
    "mov edi, {pattern_at}",
    "movabs rax, {pattern}",
    "mov ebx, {pattern_pages}",
    "5: mov ecx, 512",
    "repe scasq",
    "jne 8f",
    "cmp qword ptr [rdi], 0",
    "jne 8f",
    "add rdi, 4096",
    "inc rax",
    "dec ebx",
    "jnz 5b",
    "mov edi, {counters_at}",
    "mov ebx, {counter_pages}",
    "6: cmp qword ptr [rdi], r12",
    "jne 8f",
    "inc qword ptr [rdi]",
    "add rdi, 4096",
    "dec ebx",
    "jnz 6b",
    "inc r12",
    "mov edx, 0x3f8",
    "mov al, '.'",
    "out dx, al",
    "mov ecx, 20000",
    "7: dec ecx",
    "jnz 7b",
    "jmp 4b",
    "8: mov edx, 0x3f8",
    "mov al, 'X'",
    "out dx, al",
    "9: jmp 9b",
    "rethaw_test_guest_end:",
    pattern_at = const PATTERN_AT,
    pattern = const PATTERN,
    pattern_pages = const PATTERN_PAGES,
    counters_at = const COUNTERS_AT,
    counter_pages = const COUNTER_PAGES,
);

unsafe extern "C" {
    static rethaw_test_guest: u8;
    static rethaw_test_guest_end: u8;
}

/// Writes the guest as an ELF file that Firecracker takes for a kernel.
pub fn write_elf(path: &Path) {
    // SAFETY: the labels are in this order in one section, what is between them is code of this
    // program, which nobody writes to.
    let code = unsafe {
        let begin = &raw const rethaw_test_guest;
        let end = &raw const rethaw_test_guest_end;
        std::slice::from_raw_parts(begin, end.offset_from(begin) as usize)
    };
    const HEADERS: u64 = 64 + 56;
    let mut elf = Vec::new();
    elf.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for half in [2_u16, 62] {
        elf.extend(half.to_le_bytes()); // an executable, for x86-64
    }
    elf.extend(1_u32.to_le_bytes());
    // Entry, program headers, section headers.
    for long in [LOAD_AT, 64, 0] {
        elf.extend(long.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    // Sizes: this header; one program header; no sections.
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // The one segment: PT_LOAD, readable, writable, executable.
    for word in [1_u32, 7] {
        elf.extend(word.to_le_bytes());
    }
    let size = code.len() as u64;
    for long in [HEADERS, LOAD_AT, LOAD_AT, size, size, 4096] {
        elf.extend(long.to_le_bytes());
    }
    assert_eq!(elf.len() as u64, HEADERS);
    elf.extend(code);
    std::fs::write(path, elf).unwrap();
}

/// Checks a memory image byte for byte against what the guest writes.
pub fn check_image(memory: &[u8]) {
    let word =
        |at: u64| u64::from_le_bytes(memory[at as usize..at as usize + 8].try_into().unwrap());
    for i in 0..PATTERN_PAGES {
        let page = PATTERN_AT + i * 8192;
        for at in (page..page + 4096).step_by(8) {
            assert_eq!(word(at), PATTERN + i, "pattern page {i} at {at:#x}");
        }
        assert!((page + 4096..page + 8192).step_by(8).all(|at| word(at) == 0), "zero page {i}");
    }
}

/// Rounds the guest had finished when this memory was frozen: the counters differ by one at most,
/// in the middle of a round.
pub fn rounds(memory: &[u8]) -> u64 {
    let counter = |i: u64| {
        let at = (COUNTERS_AT + i * 4096) as usize;
        u64::from_le_bytes(memory[at..at + 8].try_into().unwrap())
    };
    let (first, last) = (counter(0), counter(COUNTER_PAGES - 1));
    assert!(first == last || first == last + 1, "counters {first} and {last}");
    last
}
