//! NDJSON frames of a running command, cut out of bytes that come in any pieces.

use guest_agent::wire::{Chunk, ErrorBody, ExecExit, ExecFrame};
use serde_json::Value;

/// Longest frame taken; the service's are far below.
const MAX_FRAME: usize = 16 << 20;

/// A stream that is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// No end of line in sight.
    #[error("the service sent a frame longer than {MAX_FRAME} bytes")]
    TooLong,
    /// Not a frame.
    #[error("the service sent a frame that cannot be read: {0}")]
    Malformed(String),
}

/// What a frame means to whoever started the command.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes for standard output or standard error.
    Output {
        /// For standard error.
        error: bool,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The end.
    Exit(ExecExit),
    /// It could not be run, or not to its end.
    Error(ErrorBody),
}

/// Collects bytes and gives events.
#[derive(Debug, Default)]
pub struct Lines {
    buffer: Vec<u8>,
    // Where the next line begins, and up to where no line end was found.
    start: usize,
    searched: usize,
}

impl Lines {
    /// Takes bytes in.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), FrameError> {
        self.buffer.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        if self.buffer.len() + bytes.len() > MAX_FRAME {
            return Err(FrameError::TooLong);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The next event among the bytes taken in.
    pub fn next_event(&mut self) -> Result<Option<Event>, FrameError> {
        loop {
            let Some(at) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') else {
                self.searched = self.buffer.len();
                return Ok(None);
            };
            let line = &self.buffer[self.start..self.searched + at];
            let event = parse(line);
            self.searched += at + 1;
            self.start = self.searched;
            if let Some(event) = event? {
                return Ok(Some(event));
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Option<Event>, FrameError> {
    if line.trim_ascii().is_empty() {
        return Ok(None);
    }
    let frame: ExecFrame = match serde_json::from_slice(line) {
        Ok(frame) => frame,
        Err(e) => return if is_unknown(line) { Ok(None) } else { Err(malformed(&e.to_string())) },
    };
    Ok(match frame {
        ExecFrame::Started(_) | ExecFrame::Keepalive(_) => None,
        ExecFrame::Stdout(chunk) => Some(output(false, chunk)?),
        ExecFrame::Stderr(chunk) => Some(output(true, chunk)?),
        ExecFrame::Exit(exit) => Some(Event::Exit(exit)),
        ExecFrame::Error(error) => Some(Event::Error(error)),
    })
}

fn output(error: bool, chunk: Chunk) -> Result<Event, FrameError> {
    let bytes = chunk.into_bytes().ok_or_else(|| malformed("output that is not base64"))?;
    Ok(Event::Output { error, bytes })
}

/// A kind of frame that a newer service may send and that can be passed over.
fn is_unknown(line: &[u8]) -> bool {
    const KNOWN: [&str; 6] = ["started", "stdout", "stderr", "keepalive", "exit", "error"];
    let value: Value = serde_json::from_slice(line).unwrap_or_default();
    value["type"].as_str().is_some_and(|kind| !KNOWN.contains(&kind))
}

fn malformed(reason: &str) -> FrameError {
    FrameError::Malformed(reason.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = concat!(
        "{\"type\":\"started\",\"pid\":7}\n",
        "{\"type\":\"stdout\",\"data\":\"hi\\n\",\"encoding\":\"utf8\"}\n",
        "{\"type\":\"keepalive\"}\n",
        "{\"type\":\"from_the_future\",\"x\":1}\n",
        "\n",
        "{\"type\":\"stderr\",\"data\":\"/wA=\",\"encoding\":\"base64\"}\n",
        "{\"type\":\"exit\",\"code\":3,\"signal\":null,\"duration_ms\":1}\n",
    );

    fn events(piece: usize) -> Vec<Event> {
        let mut lines = Lines::default();
        let mut events = Vec::new();
        for bytes in STREAM.as_bytes().chunks(piece) {
            lines.push(bytes).unwrap();
            while let Some(event) = lines.next_event().unwrap() {
                events.push(event);
            }
        }
        events
    }

    #[test]
    fn pieces_of_any_size_give_the_same_events() {
        let whole = events(STREAM.len());
        assert_eq!(whole.len(), 3);
        assert_eq!(whole[0], Event::Output { error: false, bytes: b"hi\n".to_vec() });
        assert_eq!(whole[1], Event::Output { error: true, bytes: vec![0xff, 0] });
        assert!(matches!(&whole[2], Event::Exit(exit) if exit.code == 3));
        for piece in 1..STREAM.len() {
            assert_eq!(events(piece), whole, "pieces of {piece}");
        }
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        for line in ["nonsense\n", "{\"type\":\"exit\"}\n", "{}\n", "[1]\n"] {
            let mut lines = Lines::default();
            lines.push(line.as_bytes()).unwrap();
            assert!(lines.next_event().is_err(), "{line}");
        }
    }

    #[test]
    fn an_endless_line_is_given_up() {
        let mut lines = Lines::default();
        let piece = vec![b'x'; 1 << 20];
        let given_up = (0..32).any(|_| {
            let refused = lines.push(&piece).is_err();
            refused || lines.next_event().is_err()
        });
        assert!(given_up);
    }
}
