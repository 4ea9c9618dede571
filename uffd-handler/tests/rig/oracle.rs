//! What every page of a test guest holds, known to test and fake VMM alike.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

pub const PAGE: usize = 4096;

/// Contents of a page in the template of a seed: every fourth is zeros.
pub fn template(seed: u64, page: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if page % 4 != 3 {
        fill(&mut bytes, seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (page + 1));
    }
    bytes
}

/// A page full of numbers from a seed; never zeros.
pub fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x2545_F491_4F6C_DD1D) | 1;
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

/// Contents of a page that a guest wrote with this value.
pub fn written(value: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    fill(&mut bytes, value ^ 0xABCD);
    bytes
}

/// Writes the memory file of a template.
pub fn write_memory(path: &Path, seed: u64, pages: u64) {
    let mut file = BufWriter::new(File::create(path).unwrap());
    for page in 0..pages {
        file.write_all(&template(seed, page)).unwrap();
    }
    file.flush().unwrap();
}
