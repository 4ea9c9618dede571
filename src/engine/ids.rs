//! Names nobody can guess, and clocks.

use std::time::{SystemTime, UNIX_EPOCH};

use rand::{Rng, RngCore};

const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// A sandbox or snapshot id: `[a-z0-9]{20}`, 103 bits.
pub fn new_id() -> String {
    let mut rng = rand::rng();
    (0..20).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())])).collect()
}

/// A random (version 4) UUID.
pub fn new_uuid() -> String {
    let mut b = [0_u8; 16];
    rand::rng().fill_bytes(&mut b);
    b[6] = (b[6] & 0x0f) | 0x40;
    b[8] = (b[8] & 0x3f) | 0x80;
    let h = hex::encode(b);
    format!("{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
}

/// A secret of 256 bits, in hex, with a prefix that says what it is.
pub fn new_secret(prefix: &str) -> String {
    let mut b = [0_u8; 32];
    rand::rng().fill_bytes(&mut b);
    format!("{prefix}_{}", hex::encode(b))
}

/// Nanoseconds since 1970 on this host's clock.
pub fn wall_clock_unix_nanos() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
