//! Standard input for a remote command: read when it is a pipe, a file or a socket, never when it is
//! a terminal or another device, where nobody may ever type an end of file.

use std::io::Read;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::stat::{SFlag, fstat};

/// Up to here standard input travels in the request itself; base64 in JSON stays below the
/// service's limit of 1 MiB for a body.
pub const INLINE_MAX: usize = 640 << 10;
/// When the user is told what is being waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// What there is for a command's standard input.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// Nothing.
    None,
    /// All of it.
    Whole(Vec<u8>),
    /// The beginning; the rest is still to be read.
    Beginning(Vec<u8>),
}

/// Reads standard input up to its end or [`INLINE_MAX`].
pub async fn read() -> anyhow::Result<Input> {
    if !is_stream() {
        return Ok(Input::None);
    }
    let mut reading = tokio::task::spawn_blocking(|| read_from(&mut std::io::stdin().lock()));
    let read = match tokio::time::timeout(PATIENCE, &mut reading).await {
        Ok(read) => read,
        Err(_) => {
            super::output::note(
                "waiting for the end of standard input; use -n when the command needs none",
            );
            reading.await
        }
    };
    read?.context("cannot read standard input")
}

fn is_stream() -> bool {
    // A closed descriptor is no input either.
    let Ok(stat) = fstat(std::io::stdin()) else { return false };
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    kind == SFlag::S_IFIFO || kind == SFlag::S_IFREG || kind == SFlag::S_IFSOCK
}

fn read_from(reader: &mut impl Read) -> std::io::Result<Input> {
    let mut bytes = Vec::new();
    // One byte more than fits tells "exactly full" from "there is more".
    reader.take(INLINE_MAX as u64 + 1).read_to_end(&mut bytes)?;
    Ok(if bytes.len() > INLINE_MAX { Input::Beginning(bytes) } else { Input::Whole(bytes) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_input_is_told_from_short() {
        let read = |length: usize| read_from(&mut std::io::repeat(7).take(length as u64)).unwrap();
        assert_eq!(read(0), Input::Whole(vec![]));
        assert_eq!(read(INLINE_MAX), Input::Whole(vec![7; INLINE_MAX]));
        assert_eq!(read(INLINE_MAX + 1), Input::Beginning(vec![7; INLINE_MAX + 1]));
        assert_eq!(read(INLINE_MAX + 9), Input::Beginning(vec![7; INLINE_MAX + 1]));
    }
}
