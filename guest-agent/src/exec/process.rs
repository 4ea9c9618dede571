//! Commands that run: their output's audience, their standard input, and finding them by pid.

use super::streams::{Stream, write_all};
use super::{pty, signal};
use crate::server::ApiError;
use crate::wire::{ExecFrame, ExecInput, ProcessInfo, PtySize, Started, codes};
use bytes::Bytes;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::rc::Rc;
use tokio::sync::{Notify, mpsc};

/// Output kept for those who attach later.
const RING_BYTES: usize = 64 * 1024;
/// Frames on their way to one listener; the command waits when it does not take them.
const QUEUE: usize = 8;
/// Commands at once.
const MAX_PROCESSES: usize = 256;

/// Where frames go to.
pub type Listener = mpsc::Sender<io::Result<Bytes>>;

/// A command that runs.
#[derive(Debug)]
pub struct Process {
    /// What is told about it.
    pub info: ProcessInfo,
    /// It goes on when nobody listens.
    pub background: bool,
    stdin: tokio::sync::Mutex<Option<Stream>>,
    terminal: Option<Stream>,
    /// Its remains were taken: its pid may be somebody else's.
    reaped: Cell<bool>,
    output: RefCell<Output>,
    /// Told when it is over.
    over: Notify,
}

#[derive(Debug, Default)]
struct Output {
    ring: VecDeque<Bytes>,
    ring_bytes: usize,
    listeners: Vec<Listener>,
}

impl Process {
    /// A command that was just started.
    pub fn new(
        info: ProcessInfo,
        background: bool,
        stdin: Option<Stream>,
        terminal: Option<Stream>,
    ) -> Self {
        Self {
            info,
            background,
            stdin: tokio::sync::Mutex::new(stdin),
            terminal,
            reaped: Cell::new(false),
            output: RefCell::default(),
            over: Notify::new(),
        }
    }

    /// Adds a listener, which gets `started`, with `replay` what the ring holds, and all that
    /// follows.
    pub fn listen(&self, replay: bool) -> mpsc::Receiver<io::Result<Bytes>> {
        let mut output = self.output.borrow_mut();
        let (sender, receiver) = mpsc::channel(output.ring.len() + 1 + QUEUE);
        let started = frame(&ExecFrame::Started(Started { pid: self.info.pid }));
        let remembered = output.ring.iter().filter(|_| replay).cloned();
        for line in [started].into_iter().chain(remembered) {
            // The channel was made large enough for all of them.
            let _ = sender.try_send(Ok(line));
        }
        output.listeners.push(sender);
        receiver
    }

    /// Somebody who listens now.
    pub fn any_listener(&self) -> Option<Listener> {
        let mut output = self.output.borrow_mut();
        output.listeners.retain(|l| !l.is_closed());
        output.listeners.first().cloned()
    }

    /// Hands a frame to every listener, waiting for slow ones; output is remembered in the ring.
    pub async fn publish(&self, line: Bytes, remember: bool) {
        let listeners: Vec<Listener> = {
            let mut output = self.output.borrow_mut();
            if remember {
                output.ring_bytes += line.len();
                output.ring.push_back(line.clone());
                while output.ring_bytes > RING_BYTES {
                    let Some(oldest) = output.ring.pop_front() else { break };
                    output.ring_bytes -= oldest.len();
                }
            }
            output.listeners.retain(|l| !l.is_closed());
            output.listeners.clone()
        };
        for listener in listeners {
            // It may leave while it is waited for, which is its own business.
            let _ = listener.send(Ok(line.clone())).await;
        }
    }

    /// Hands out the last frame and lets every listener go.
    pub async fn finish(&self, last: Bytes) {
        self.publish(last, false).await;
        self.output.borrow_mut().listeners.clear();
        // The permit stays for a waiter that is not there yet.
        self.over.notify_one();
    }

    /// Resolves when the last frame has been handed out; for one waiter.
    pub async fn over(&self) {
        self.over.notified().await;
    }

    /// Records that its remains were taken.
    pub fn set_reaped(&self) {
        self.reaped.set(true);
    }

    /// Sends a signal to the command and all of its process group.
    pub fn signal(&self, signal: Signal) -> bool {
        !self.reaped.get() && killpg(Pid::from_raw(self.info.pid as i32), signal).is_ok()
    }

    /// Writes to standard input, as fast as the command reads.
    ///
    /// # Errors
    /// 409 when it is closed.
    pub async fn write_stdin(&self, data: &[u8]) -> Result<(), ApiError> {
        let closed = || {
            let text = format!("standard input of process {} is closed", self.info.pid);
            ApiError::new(409, codes::WRONG_STATE, text)
        };
        let mut stdin = self.stdin.lock().await;
        let stream = stdin.as_ref().ok_or_else(closed)?;
        if write_all(stream, data).await.is_err() {
            *stdin = None;
            return Err(closed());
        }
        Ok(())
    }

    /// Closes standard input. On a terminal that is a Ctrl-D.
    pub async fn close_stdin(&self) {
        const END_OF_TRANSMISSION: &[u8] = &[4];
        let mut stdin = self.stdin.lock().await;
        match (&self.terminal, stdin.as_ref()) {
            (Some(_), Some(stream)) => {
                // A terminal that is gone has no input to close.
                let _ = write_all(stream, END_OF_TRANSMISSION).await;
            }
            _ => *stdin = None,
        }
    }

    /// Gives the terminal another size.
    ///
    /// # Errors
    /// 409 without a terminal.
    pub fn resize(&self, size: PtySize) -> Result<(), ApiError> {
        let Some(terminal) = &self.terminal else {
            let text = format!("process {} has no terminal", self.info.pid);
            return Err(ApiError::new(409, codes::WRONG_STATE, text));
        };
        Ok(pty::resize(terminal.as_ref(), size)?)
    }

    /// Does what an input line asks for.
    ///
    /// # Errors
    /// 409 and 422, as the single calls have them.
    pub async fn input(&self, input: ExecInput) -> Result<(), ApiError> {
        match input {
            ExecInput::Stdin(data) => self.write_stdin(&data.0).await,
            ExecInput::Eof(_) => {
                self.close_stdin().await;
                Ok(())
            }
            ExecInput::Resize(size) => self.resize(size),
            ExecInput::Signal(name) => {
                self.signal(parse_signal(&name)?);
                Ok(())
            }
        }
    }
}

/// A signal from its name.
///
/// # Errors
/// 422 `invalid_command`.
pub fn parse_signal(name: &str) -> Result<Signal, ApiError> {
    signal::parse(name).ok_or_else(|| {
        ApiError::new(422, codes::INVALID_COMMAND, format!("there is no signal {name:?}"))
    })
}

/// A frame as a line.
pub fn frame(frame: &ExecFrame) -> Bytes {
    let mut line = Vec::with_capacity(96);
    // Frames hold strings and numbers only: writing them to memory cannot fail.
    if serde_json::to_writer(&mut line, frame).is_err() {
        line.clear();
    }
    line.push(b'\n');
    line.into()
}

/// The commands that run, by pid.
#[derive(Debug, Default)]
pub struct Processes {
    running: RefCell<BTreeMap<u32, Rc<Process>>>,
}

impl Processes {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.running.borrow().len()
    }

    /// Refuses when there are too many.
    ///
    /// # Errors
    /// 429 `too_many_processes`.
    pub fn require_room(&self) -> Result<(), ApiError> {
        if self.count() < MAX_PROCESSES {
            return Ok(());
        }
        let text = format!("{MAX_PROCESSES} commands run already");
        Err(ApiError::new(429, codes::TOO_MANY_PROCESSES, text))
    }

    /// Adds one.
    pub fn add(&self, process: &Rc<Process>) {
        self.running.borrow_mut().insert(process.info.pid, Rc::clone(process));
    }

    /// Removes one that has ended.
    pub fn remove(&self, process: &Rc<Process>) {
        let mut running = self.running.borrow_mut();
        // Its pid may be taken by a later one already.
        if running.get(&process.info.pid).is_some_and(|p| Rc::ptr_eq(p, process)) {
            running.remove(&process.info.pid);
        }
    }

    /// Finds one.
    ///
    /// # Errors
    /// 404 `process_not_found`.
    pub fn get(&self, pid: u32) -> Result<Rc<Process>, ApiError> {
        self.running.borrow().get(&pid).cloned().ok_or_else(|| {
            ApiError::new(404, codes::PROCESS_NOT_FOUND, format!("no process {pid} is running"))
        })
    }

    /// All of them.
    pub fn list(&self) -> Vec<ProcessInfo> {
        self.running.borrow().values().map(|p| p.info.clone()).collect()
    }
}
