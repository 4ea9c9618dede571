//! The request's side of a command: lines of JSON, and the feeding of standard input from them.

use super::Process;
use crate::server::ApiError;
use crate::wire::{ExecInput, codes};
use bytes::{Buf, Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use std::rc::Rc;

/// A line is never longer than this.
const MAX_LINE: usize = 4 * 1024 * 1024;

/// Lines of a request body; the last one needs no line end.
#[derive(Debug)]
pub struct Lines {
    body: Incoming,
    buffer: BytesMut,
    scanned: usize,
    ended: bool,
}

impl Lines {
    /// Nothing is read yet.
    pub fn new(body: Incoming) -> Self {
        Self { body, buffer: BytesMut::new(), scanned: 0, ended: false }
    }

    /// The next line that is not blank; `None` at the end.
    ///
    /// # Errors
    /// 400 when the body breaks off, 413 when a line is too long.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        loop {
            let line = if let Some(at) = memchr::memchr(b'\n', &self.buffer[self.scanned..]) {
                let line = self.buffer.split_to(self.scanned + at).freeze();
                self.buffer.advance(1);
                self.scanned = 0;
                line
            } else if self.ended {
                if self.buffer.is_empty() {
                    return Ok(None);
                }
                self.scanned = 0;
                self.buffer.split().freeze()
            } else {
                self.fill().await?;
                continue;
            };
            if !line.trim_ascii().is_empty() {
                return Ok(Some(line));
            }
        }
    }

    async fn fill(&mut self) -> Result<(), ApiError> {
        self.scanned = self.buffer.len();
        if self.scanned > MAX_LINE {
            let text = format!("a line is longer than {MAX_LINE} bytes");
            return Err(ApiError::new(413, codes::BODY_TOO_LARGE, text));
        }
        match self.body.frame().await {
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    self.buffer.extend_from_slice(&data);
                }
            }
            Some(Err(error)) => {
                let text = format!("the request broke off: {error}");
                return Err(ApiError::new(400, codes::INVALID_REQUEST, text));
            }
            None => self.ended = true,
        }
        Ok(())
    }
}

/// What is to be written to a command's standard input.
#[derive(Debug)]
pub struct Feed {
    text: Option<String>,
    lines: Option<Lines>,
    keep_open: bool,
}

impl Feed {
    /// `None` when there is nothing to write and nothing to close.
    pub fn new(text: Option<String>, follow: bool, keep_open: bool, lines: Lines) -> Option<Self> {
        let lines = follow.then_some(lines);
        (text.is_some() || lines.is_some()).then_some(Self { text, lines, keep_open })
    }

    /// Writes it all, as fast as the command reads, until there is no more or the command is over.
    pub async fn run(self, process: Rc<Process>) {
        tokio::select! {
            () = self.write(&process) => {}
            () = process.over() => {}
        }
    }

    async fn write(self, process: &Process) {
        if let Some(text) = self.text
            && process.write_stdin(text.as_bytes()).await.is_err()
        {
            return;
        }
        if let Some(mut lines) = self.lines {
            while let Ok(Some(line)) = lines.next().await {
                // A line that cannot be done has nobody to tell: the answer is the command's
                // output. One that cannot be understood ends the input, so that it is noticed.
                let Ok(input) = serde_json::from_slice::<ExecInput>(&line) else { break };
                let _ = process.input(input).await;
            }
        }
        if !self.keep_open {
            process.close_stdin().await;
        }
    }
}
