//! Standard output, where results go: text or JSON, and quiet when the reader has gone.

use std::io::Write;

use serde::Serialize;

/// Whoever read standard output does not want more; no reason for noise.
#[derive(Debug, thiserror::Error)]
#[error("standard output was closed")]
pub struct OutputClosed;

/// Writes bytes through at once.
pub fn write(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    through(out.write_all(bytes).and_then(|()| out.flush()))
}

/// Writes bytes to standard error, at once.
pub fn write_error(bytes: &[u8]) -> anyhow::Result<()> {
    let mut err = std::io::stderr().lock();
    through(err.write_all(bytes).and_then(|()| err.flush()))
}

/// Writes a line.
pub fn line(text: &str) -> anyhow::Result<()> {
    write(format!("{text}\n").as_bytes())
}

/// Writes a JSON document.
pub fn json(value: &(impl Serialize + ?Sized)) -> anyhow::Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// What rethaw itself has to say, on standard error.
pub fn note(text: &str) {
    // Nobody can be told that standard error is closed.
    let _ = writeln!(std::io::stderr(), "rethaw: {text}");
}

fn through(result: std::io::Result<()>) -> anyhow::Result<()> {
    match result {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Err(OutputClosed.into()),
        Err(e) => Err(anyhow::Error::new(e).context("cannot write the output")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gone_reader_is_told_from_a_full_disk() {
        let closed = through(Err(std::io::ErrorKind::BrokenPipe.into())).unwrap_err();
        assert!(closed.is::<OutputClosed>());
        let full = through(Err(std::io::ErrorKind::StorageFull.into())).unwrap_err();
        assert!(!full.is::<OutputClosed>());
    }
}
