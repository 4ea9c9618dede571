//! Huge pages of this host, reserved for as long as a test needs them.

use std::path::Path;

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// So many pages of 2 MiB are there; given back when dropped.
pub struct Reserved(u64);

fn read(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

impl Reserved {
    /// Nothing, with the reason on standard error, where the host has none to give.
    pub fn new(count: u64) -> Option<Self> {
        let pool = Path::new(POOL);
        let Some(before) = read(pool) else {
            eprintln!("SKIPPED: this kernel has no huge pages");
            return None;
        };
        let wanted = before + count;
        let set = std::fs::write(pool, wanted.to_string());
        let reserved = Self(before);
        match (set, read(pool)) {
            (Ok(()), Some(now)) if now >= wanted => Some(reserved),
            (Err(error), _) => {
                eprintln!("SKIPPED: huge pages cannot be reserved: {error}");
                None
            }
            (_, now) => {
                eprintln!(
                    "SKIPPED: {count} huge pages are not to be had: {before} before, {now:?} now"
                );
                None
            }
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(POOL, self.0.to_string());
    }
}
