//! Logs that stay below a size: a full one becomes `FILE.1`, that `FILE.2` and so on, and so many are
//! kept.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Size of the file that standard error goes to, and of the one that was full before it.
const STDERR_BYTES: u64 = 16 << 20;

/// A log.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    options: OpenOptions,
    file: File,
    bytes: u64,
    max_bytes: u64,
    kept: u32,
}

impl LogFile {
    /// Opens it, made as `options` say, to write after what is there already.
    pub fn open(
        path: &Path,
        mut options: OpenOptions,
        max_bytes: u64,
        kept: u32,
    ) -> io::Result<Self> {
        let file = options.create(true).append(true).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), options, file, bytes, max_bytes, kept })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Begins a new file if a line of this length would make this one too long; `true` if it did.
    pub fn make_room(&mut self, line: usize) -> io::Result<bool> {
        let full = self.bytes > 0 && self.bytes + line as u64 > self.max_bytes;
        if full {
            self.rotate()?;
        }
        Ok(full)
    }

    fn rotate(&mut self) -> io::Result<()> {
        let older = |n: u32| {
            let mut name = self.path.clone().into_os_string();
            name.push(format!(".{n}"));
            PathBuf::from(name)
        };
        for n in (1..self.kept).rev() {
            match std::fs::rename(older(n), older(n + 1)) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        std::fs::rename(&self.path, older(1))?;
        *self = Self::open(&self.path, self.options.clone(), self.max_bytes, self.kept)?;
        Ok(())
    }
}

impl Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let written = self.file.write(line)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A log that standard error goes to, for as long as the process runs: what is printed otherwise, such as
/// a panic, is in it, too.
#[derive(Debug)]
pub struct StderrLog(LogFile);

impl StderrLog {
    /// Has standard error go to this file from now on.
    pub fn open(path: &Path) -> io::Result<Self> {
        let log = LogFile::open(path, File::options(), STDERR_BYTES, 1)?;
        nix::unistd::dup2_stderr(&log.file)?;
        Ok(Self(log))
    }
}

impl Write for StderrLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Whoever removed the file, or made it unwritable, does not silence the log.
        if let Ok(true) = self.0.make_room(line.len()) {
            let _ = nix::unistd::dup2_stderr(&self.0.file);
        }
        self.0.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(log: &mut LogFile, line: &str) {
        // As standard error's log does.
        let _ = log.make_room(line.len());
        log.write_all(line.as_bytes()).unwrap();
    }

    #[test]
    fn a_full_log_becomes_the_old_one_and_no_line_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "before\n").unwrap();
        let mut log = LogFile::open(&path, File::options(), 16, 1).unwrap();
        for line in ["one\n", "four\n", "seven\n"] {
            append(&mut log, line);
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(
            (read("log.1").as_str(), read("log").as_str()),
            ("before\none\nfour\n", "seven\n")
        );
        for line in ["a line longer than it may be\n", "last\n"] {
            append(&mut log, line);
        }
        assert_eq!(read("log.1"), "a line longer than it may be\n");
        assert_eq!(read("log"), "last\n");
    }

    #[test]
    fn a_log_that_cannot_be_rotated_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogFile::open(&path, File::options(), 8, 1).unwrap();
        append(&mut log, "first\n");
        std::fs::create_dir_all(dir.path().join("log.1/in the way")).unwrap();
        append(&mut log, "second\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "first\nsecond\n");
    }
}
