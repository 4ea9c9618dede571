//! A log that a process keeps below a size for as long as it runs: standard error goes to a file, which
//! becomes `FILE.1` when it is full. What the process prints otherwise, such as a panic, goes there too.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Size of the file, and of the one that was full before it.
const MAX_BYTES: u64 = 16 << 20;

/// The log.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    bytes: u64,
    max_bytes: u64,
    file: File,
    // Whether standard error follows.
    is_stderr: bool,
}

impl LogFile {
    /// Has standard error go to this file from now on, after what is there already.
    pub fn as_stderr(path: &Path) -> io::Result<Self> {
        let log = Self::open(path, MAX_BYTES, true)?;
        nix::unistd::dup2_stderr(&log.file)?;
        Ok(log)
    }

    fn open(path: &Path, max_bytes: u64, is_stderr: bool) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), bytes, max_bytes, file, is_stderr })
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        std::fs::rename(&self.path, old)?;
        *self = Self::open(&self.path, self.max_bytes, self.is_stderr)?;
        if self.is_stderr {
            nix::unistd::dup2_stderr(&self.file)?;
        }
        Ok(())
    }
}

impl Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.max_bytes {
            // Whoever removed the file, or made it unwritable, does not silence the log.
            let _ = self.rotate();
        }
        let written = self.file.write(line)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_becomes_the_old_one_and_no_line_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "before\n").unwrap();
        let mut log = LogFile::open(&path, 16, false).unwrap();
        for line in ["one\n", "four\n", "seven\n"] {
            log.write_all(line.as_bytes()).unwrap();
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(
            (read("log.1").as_str(), read("log").as_str()),
            ("before\none\nfour\n", "seven\n")
        );
        for line in ["a line longer than it may be\n", "last\n"] {
            log.write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(read("log.1"), "a line longer than it may be\n");
        assert_eq!(read("log"), "last\n");
    }

    #[test]
    fn a_log_that_cannot_be_rotated_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogFile::open(&path, 8, false).unwrap();
        log.write_all(b"first\n").unwrap();
        std::fs::create_dir_all(dir.path().join("log.1/in the way")).unwrap();
        log.write_all(b"second\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "first\nsecond\n");
    }
}
