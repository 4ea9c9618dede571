//! QEMU's control protocol (QMP): one JSON object a line, replies matched by id, events by name.
//!
//! Source for the wire format: QEMU's `docs/interop/qmp-spec.txt` (7.2).

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, broadcast, oneshot};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU answered with an error.
    #[error("{command}: {message}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's own text.
        message: String,
    },
    /// No answer in time.
    #[error("{command}: no answer within {after:?}")]
    Timeout {
        /// The command.
        command: String,
        /// The deadline.
        after: Duration,
    },
    /// The socket failed or was closed.
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
}

/// An event QEMU sent on its own.
#[derive(Debug, Clone)]
pub struct Event {
    /// `STOP`, `RESUME`, `MIGRATION`, ...
    pub name: String,
    /// Its data, `null` if it has none.
    pub data: Value,
}

#[derive(Debug, Default)]
struct Waiting {
    by_id: HashMap<u64, oneshot::Sender<Result<Value, String>>>,
    next_id: u64,
    closed: bool,
}

/// A connection to one QEMU's control socket.
#[derive(Debug)]
pub struct Qmp {
    writer: AsyncMutex<OwnedWriteHalf>,
    // A std mutex: it is only ever held for a map operation, never across an await.
    waiting: Arc<Mutex<Waiting>>,
    events: broadcast::Sender<Event>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Qmp {
    /// Connects and negotiates capabilities. The socket must already be listening; QEMU may still
    /// be starting, its greeting is awaited within `deadline`.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path).await?;
        let (read, writer) = stream.into_split();
        let mut lines = BufReader::new(read);
        let mut greeting = String::new();
        tokio::time::timeout(deadline, lines.read_line(&mut greeting))
            .await
            .map_err(|_| QmpError::Timeout { command: "greeting".to_owned(), after: deadline })??;
        if !greeting.contains("\"QMP\"") {
            let text = if greeting.is_empty() { "closed before its greeting" } else { &greeting };
            return Err(io::Error::new(io::ErrorKind::InvalidData, text.to_owned()).into());
        }
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let (events, _) = broadcast::channel(64);
        let reader = tokio::spawn(read_loop(lines, Arc::clone(&waiting), events.clone()));
        let qmp = Self { writer: AsyncMutex::new(writer), waiting, events, reader };
        qmp.command("qmp_capabilities", json!({}), deadline).await?;
        Ok(qmp)
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Sends one command and waits for its reply.
    pub async fn command(
        &self,
        name: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let reply = self.send(name, arguments).await?;
        match tokio::time::timeout(deadline, reply).await {
            Err(_) => Err(QmpError::Timeout { command: name.to_owned(), after: deadline }),
            Ok(Err(_)) => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(Ok(Err(message))) => Err(QmpError::Refused { command: name.to_owned(), message }),
            Ok(Ok(Ok(value))) => Ok(value),
        }
    }

    async fn send(
        &self,
        name: &str,
        arguments: Value,
    ) -> Result<oneshot::Receiver<Result<Value, String>>, QmpError> {
        let (tx, rx) = oneshot::channel();
        let id = {
            let mut waiting = lock(&self.waiting);
            if waiting.closed {
                return Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
            }
            waiting.next_id += 1;
            let id = waiting.next_id;
            waiting.by_id.insert(id, tx);
            id
        };
        // As short as can be: QEMU reads its control socket byte by byte, with a handful of system
        // calls for each.
        let mut line = match arguments.as_object() {
            Some(none) if none.is_empty() => json!({"execute": name, "id": id}).to_string(),
            _ => json!({"execute": name, "arguments": arguments, "id": id}).to_string(),
        };
        line.push('\n');
        self.writer.lock().await.write_all(line.as_bytes()).await?;
        Ok(rx)
    }
}

fn lock(waiting: &Mutex<Waiting>) -> std::sync::MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

async fn read_loop(
    lines: BufReader<OwnedReadHalf>,
    waiting: Arc<Mutex<Waiting>>,
    events: broadcast::Sender<Event>,
) {
    let mut lines = lines.lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Ok(mut message) = serde_json::from_str::<Value>(&line) else { continue };
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            let event = Event { name: name.to_owned(), data: message["data"].take() };
            // Nobody listening is fine.
            let _ = events.send(event);
            continue;
        }
        let Some(id) = message.get("id").and_then(Value::as_u64) else { continue };
        let Some(reply) = lock(&waiting).by_id.remove(&id) else { continue };
        let result = match message.get_mut("error") {
            Some(error) => Err(error["desc"].as_str().unwrap_or("unknown error").to_owned()),
            None => Ok(message["return"].take()),
        };
        let _ = reply.send(result);
    }
    let mut waiting = lock(&waiting);
    waiting.closed = true;
    // Dropping the senders ends every waiting command with an error.
    waiting.by_id.clear();
}
