//! Commands of a build: run to their end, or started to stay; their output goes to the log, and its
//! end into the message when they fail.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guest_agent::client::{AgentClient, AgentError, ExecStream, full_body};
use guest_agent::wire::{Chunk, ExecFrame, ExecRequest};
use hyper::{Method, Request};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::log::{BuildLog, Kind};
use super::spec::Step;

/// How long the guest may take to start a command.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How much longer than a command's own limit its end may take to arrive.
const END_GRACE: Duration = Duration::from_secs(30);
/// Lines kept for a message, and the longest of them.
const TAIL_LINES: usize = 20;
const TAIL_LINE: usize = 1000;
/// A port that opens and a command that will succeed some day make no event: they are asked.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// The last lines of an output.
#[derive(Debug, Default)]
struct Tail {
    lines: VecDeque<String>,
    open: String,
}

impl Tail {
    fn add(&mut self, text: &str) {
        for part in text.split_inclusive('\n') {
            if self.open.len() < TAIL_LINE {
                self.open.extend(part.trim_end_matches(['\n', '\r']).chars().take(TAIL_LINE));
            }
            if part.ends_with('\n') {
                self.close();
            }
        }
    }

    fn close(&mut self) {
        let line = std::mem::take(&mut self.open);
        if line.trim().is_empty() {
            return;
        }
        if self.lines.len() == TAIL_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    fn lines(&self) -> Vec<String> {
        let open = (!self.open.trim().is_empty()).then(|| self.open.clone());
        self.lines.iter().cloned().chain(open).collect()
    }
}

/// Where the output of a step goes.
#[derive(Debug)]
pub struct Output<'a> {
    log: &'a BuildLog,
    step: usize,
    tail: Tail,
}

impl<'a> Output<'a> {
    /// For a step, counted from 1.
    pub fn new(log: &'a BuildLog, step: usize) -> Self {
        Self { log, step, tail: Tail::default() }
    }

    /// The last lines.
    pub fn tail(&self) -> Vec<String> {
        self.tail.lines()
    }

    fn take(&mut self, kind: Kind, chunk: Chunk) {
        let bytes = chunk.into_bytes().unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        self.tail.add(&text);
        self.log.write(kind, Some(self.step), &text);
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself.
    Exit(i32),
    /// Because its time was up.
    TimedOut,
}

/// Runs a command to its end; its own limit is in the request, `timeout` is the same.
pub async fn run(
    agent: &AgentClient,
    request: &ExecRequest,
    timeout: Duration,
    output: &mut Output<'_>,
) -> Result<Ended, AgentError> {
    let follow = async {
        let mut stream = agent.exec(request, START_DEADLINE).await?;
        follow(&mut stream, |kind, chunk| output.take(kind, chunk)).await
    };
    match tokio::time::timeout(timeout + END_GRACE, follow).await {
        Ok(done) => done,
        Err(_) => Ok(Ended::TimedOut),
    }
}

async fn follow(
    stream: &mut ExecStream,
    mut take: impl FnMut(Kind, Chunk),
) -> Result<Ended, AgentError> {
    loop {
        match stream.next_frame().await? {
            Some(ExecFrame::Stdout(chunk)) => take(Kind::Stdout, chunk),
            Some(ExecFrame::Stderr(chunk)) => take(Kind::Stderr, chunk),
            Some(ExecFrame::Exit(exit)) if exit.timed_out => return Ok(Ended::TimedOut),
            Some(ExecFrame::Exit(exit)) => return Ok(Ended::Exit(exit.code)),
            Some(ExecFrame::Error(e)) => return Err(AgentError::Protocol(e.message)),
            Some(ExecFrame::Started(_) | ExecFrame::Keepalive(_)) => {}
            None => {
                let text = "the command's frames ended without its exit";
                return Err(AgentError::Disconnected(text.to_owned()));
            }
        }
    }
}

/// Runs a command again and again until it ends with 0.
pub async fn until_zero(
    agent: &AgentClient,
    request: &ExecRequest,
    output: &mut Output<'_>,
) -> Result<(), AgentError> {
    loop {
        let mut stream = agent.exec(request, START_DEADLINE).await?;
        // Only the last attempt's output tells anything.
        output.tail = Tail::default();
        let ended = follow(&mut stream, |kind, chunk| output.take(kind, chunk)).await?;
        if ended == Ended::Exit(0) {
            return Ok(());
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// Waits until a port of the guest's own accepts a connection.
pub async fn port_open(agent: &AgentClient, port: u16) -> Result<(), AgentError> {
    loop {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("/tunnel?port={port}"))
            .body(full_body(Vec::new()))
            .map_err(|e| AgentError::Protocol(format!("tunnel: {e}")))?;
        let answer = agent.send(request).await?;
        if answer.status().is_success() {
            return Ok(());
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// A command that was started to stay in the template.
#[derive(Debug)]
pub struct Service {
    /// The step that started it.
    pub step: usize,
    /// What that step was.
    pub what: String,
    tail: Arc<Mutex<Tail>>,
    ended: watch::Receiver<Option<i32>>,
    // Lets go of its output; the command itself goes on.
    listener: JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

impl Service {
    /// Starts it and listens to it for as long as this lives.
    pub async fn start(
        agent: &AgentClient,
        request: ExecRequest,
        log: &BuildLog,
        number: usize,
        step: &Step,
    ) -> Result<Self, AgentError> {
        let mut stream = agent.exec(&request, START_DEADLINE).await?;
        let (sender, ended) = watch::channel(None);
        let tail = Arc::new(Mutex::new(Tail::default()));
        let (log, shared) = (log.clone(), Arc::clone(&tail));
        let listener = tokio::spawn(async move {
            let done = follow(&mut stream, |kind, chunk| {
                let bytes = chunk.into_bytes().unwrap_or_default();
                let text = String::from_utf8_lossy(&bytes);
                lock(&shared).add(&text);
                log.write(kind, Some(number), &text);
            });
            // A connection that breaks is noticed by whoever uses it next.
            if let Ok(Ended::Exit(code)) = done.await {
                let _ = sender.send(Some(code));
            }
        });
        Ok(Self { step: number, what: step.summary(), tail, ended, listener })
    }

    /// Its exit code, if it has ended.
    pub fn ended(&self) -> Option<i32> {
        *self.ended.borrow()
    }

    /// Its last lines.
    pub fn tail(&self) -> Vec<String> {
        lock(&self.tail).lines()
    }
}

/// Resolves when one of them ends.
pub async fn any_ends(services: &[Service]) {
    let ends = services.iter().map(|service| {
        let mut ended = service.ended.clone();
        Box::pin(async move {
            if ended.wait_for(Option::is_some).await.is_err() {
                std::future::pending::<()>().await;
            }
        })
    });
    let ends: Vec<_> = ends.collect();
    if ends.is_empty() {
        std::future::pending::<()>().await;
    }
    futures_util::future::select_all(ends).await;
}

fn lock(tail: &Mutex<Tail>) -> std::sync::MutexGuard<'_, Tail> {
    tail.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_has_the_last_lines() {
        let mut tail = Tail::default();
        tail.add("one\ntw");
        tail.add("o\r\n\n  \nthree");
        assert_eq!(tail.lines(), ["one", "two", "three"]);
        for n in 0..50 {
            tail.add(&format!("{n}\n"));
        }
        assert_eq!(tail.lines().len(), TAIL_LINES);
        assert_eq!(tail.lines().last().unwrap(), "49");
        tail.add(&"x".repeat(1 << 20));
        assert!(tail.lines().last().unwrap().len() <= 2 * TAIL_LINE);
    }
}
