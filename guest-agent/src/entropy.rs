//! Fresh entropy for the kernel's random number generator.
//!
//! Adding it is not enough: the generator would go on with its cloned key for up to minutes. The
//! second request makes it take a new key at once, which per-CPU generators and the vDSO follow.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

/// Bytes a host has to send.
pub const BYTES: usize = 64;
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// The kernel's `struct rand_pool_info` with room for the seed.
#[repr(C)]
struct Pool {
    entropy_bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; BYTES],
}

/// Refuses a seed that is no seed.
///
/// # Errors
/// Wrong length, or every byte the same.
pub fn check(seed: &[u8]) -> io::Result<()> {
    if seed.len() != BYTES {
        let text = format!("entropy must be {BYTES} bytes, not {}", seed.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    if seed.iter().all(|b| *b == seed[0]) {
        let text = "every byte of the entropy is the same";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(())
}

/// Opens the kernel's generator.
///
/// # Errors
/// There is no `/dev/urandom`.
pub fn open() -> io::Result<File> {
    OpenOptions::new().write(true).open("/dev/urandom")
}

/// Adds the seed and makes the generator take a new key from it.
///
/// # Errors
/// Not permitted, or the generator is not ready.
pub fn reseed(device: &File, seed: &[u8]) -> io::Result<()> {
    check(seed)?;
    let mut pool = Pool { entropy_bits: 8 * BYTES as i32, size: BYTES as i32, bytes: [0; BYTES] };
    pool.bytes.copy_from_slice(seed);
    // SAFETY: the kernel reads `size` bytes that follow the two integers, and `Pool` has them.
    let added = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const pool) };
    // The seed would otherwise stay in this process's memory, and in the next snapshot.
    pool.bytes = [0; BYTES];
    std::hint::black_box(&pool);
    if added != 0 {
        return Err(named("RNDADDENTROPY"));
    }
    // SAFETY: the request takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG, 0) } != 0 {
        return Err(named("RNDRESEEDCRNG"));
    }
    Ok(())
}

fn named(what: &str) -> io::Error {
    let error = io::Error::last_os_error();
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
