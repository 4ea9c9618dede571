//! A running command, seen from the host.

use super::{AgentClient, AgentError, RequestBody, collect};
use crate::wire::{ExecFrame, ExecInput, ExecRequest};
use bytes::{Buf, Bytes, BytesMut};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::http::{Method, Request};
use std::time::Duration;
use tokio::sync::mpsc;

/// A frame's line is never longer than this.
const MAX_LINE: usize = 4 * 1024 * 1024;
/// Inputs on their way to the agent; a sender waits when there are more.
const INPUTS: usize = 16;

/// The frames of one command. Dropping it kills the command, unless it was started in the
/// background.
#[derive(Debug)]
pub struct ExecStream {
    body: Incoming,
    buffer: BytesMut,
    scanned: usize,
    finished: bool,
    input: ExecSender,
}

/// Feeds a command that was started with `stdin_stream`.
#[derive(Debug, Clone)]
pub struct ExecSender {
    lines: mpsc::Sender<Bytes>,
}

impl ExecSender {
    /// Sends one input; waits while the command does not read.
    ///
    /// # Errors
    /// `Disconnected` when the command or the connection is gone.
    pub async fn send(&self, input: &ExecInput) -> Result<(), AgentError> {
        let line = line(input)?;
        let gone = |_| AgentError::Disconnected("the command takes no input any more".to_owned());
        self.lines.send(line).await.map_err(gone)
    }
}

fn line<T: serde::Serialize>(value: &T) -> Result<Bytes, AgentError> {
    let mut line =
        serde_json::to_vec(value).map_err(|e| AgentError::Protocol(format!("exec: {e}")))?;
    line.push(b'\n');
    Ok(line.into())
}

impl AgentClient {
    /// Starts a command. The deadline is for the start only; how long it may run is in the request.
    ///
    /// # Errors
    /// `Refused` when it cannot be started: 422 `program_not_found` and its like, 409 when the VM
    /// has no identity yet.
    pub async fn exec(
        &self,
        request: &ExecRequest,
        deadline: Duration,
    ) -> Result<ExecStream, AgentError> {
        let (lines, mut receiver) = mpsc::channel::<Bytes>(INPUTS);
        let first = line(request)?;
        let body: RequestBody = if request.stdin_stream {
            let mut first = Some(first);
            let stream = futures_util::stream::poll_fn(move |cx| match first.take() {
                Some(first) => std::task::Poll::Ready(Some(Ok(Frame::data(first)))),
                None => receiver.poll_recv(cx).map(|line| line.map(|l| Ok(Frame::data(l)))),
            });
            StreamBody::new(stream).boxed_unsync()
        } else {
            super::full_body(first)
        };
        let request = Request::builder()
            .method(Method::POST)
            .uri("/exec")
            .body(body)
            .map_err(|e| AgentError::Protocol(format!("exec: {e}")))?;
        self.open_frames(request, ExecSender { lines }, deadline).await
    }

    /// Attaches to a running command's output, with `replay` from what its buffer still holds.
    ///
    /// # Errors
    /// `Refused` with 404 `process_not_found`.
    pub async fn attach(
        &self,
        pid: u32,
        replay: bool,
        deadline: Duration,
    ) -> Result<ExecStream, AgentError> {
        let (lines, _) = mpsc::channel(1);
        let request = Request::builder()
            .method(Method::GET)
            .uri(format!("/processes/{pid}/stream?replay={replay}"))
            .body(super::full_body(Bytes::new()))
            .map_err(|e| AgentError::Protocol(format!("attach: {e}")))?;
        self.open_frames(request, ExecSender { lines }, deadline).await
    }

    async fn open_frames(
        &self,
        request: Request<RequestBody>,
        input: ExecSender,
        deadline: Duration,
    ) -> Result<ExecStream, AgentError> {
        let call = request.uri().path().to_owned();
        let work = async {
            let answer = self.send(request).await?;
            let status = answer.status();
            if !status.is_success() {
                return Err(AgentError::refused(status, &collect(answer.into_body()).await?));
            }
            let body = answer.into_body();
            Ok(ExecStream { body, buffer: BytesMut::new(), scanned: 0, finished: false, input })
        };
        tokio::time::timeout(deadline, work)
            .await
            .map_err(|_| AgentError::Timeout { call, deadline })?
    }
}

impl ExecStream {
    /// The sender for input frames; of use only when the request asked for `stdin_stream`.
    pub fn sender(&self) -> ExecSender {
        self.input.clone()
    }

    /// The next frame; `None` after the terminal one.
    ///
    /// # Errors
    /// `Disconnected` when the stream ends without a terminal frame, `Protocol` on a bad line.
    pub async fn next_frame(&mut self) -> Result<Option<ExecFrame>, AgentError> {
        match self.next_line().await? {
            Some(line) => {
                let frame: ExecFrame = serde_json::from_slice(&line)
                    .map_err(|e| AgentError::Protocol(format!("exec frame: {e}")))?;
                self.finished |= frame.is_terminal();
                Ok(Some(frame))
            }
            None if self.finished => Ok(None),
            None => {
                let text = "the frames ended without the command's end";
                Err(AgentError::Disconnected(text.to_owned()))
            }
        }
    }

    /// The next frame as the agent wrote it, without the line end: for passing it on unparsed.
    ///
    /// # Errors
    /// `Disconnected` when the connection breaks.
    pub async fn next_line(&mut self) -> Result<Option<Bytes>, AgentError> {
        loop {
            if let Some(at) = self.buffer[self.scanned..].iter().position(|b| *b == b'\n') {
                let line = self.buffer.split_to(self.scanned + at).freeze();
                self.buffer.advance(1);
                self.scanned = 0;
                return Ok(Some(line));
            }
            self.scanned = self.buffer.len();
            if self.scanned > MAX_LINE {
                return Err(AgentError::Protocol(format!("exec frame over {MAX_LINE} bytes")));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Err(AgentError::from_hyper(&error)),
                None if self.buffer.is_empty() => return Ok(None),
                None => {
                    let text = "the frames ended in the middle of a line";
                    return Err(AgentError::Disconnected(text.to_owned()));
                }
            }
        }
    }
}
