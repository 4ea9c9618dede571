//! A connection to a page server, with requests on the way.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use thiserror::Error;

use crate::control::{Channel, ChannelError, Event, FromPager, Reply, Request, ToPager};

/// A reply and its descriptors.
pub(super) type Answer = (Reply, Vec<OwnedFd>);

/// Why a request has no answer.
#[derive(Debug, Error)]
pub(super) enum RequestError {
    #[error("the page server is gone")]
    Disconnected,
    #[error("the page server did not answer in time")]
    TimedOut,
    #[error(transparent)]
    Channel(ChannelError),
}

impl From<ChannelError> for RequestError {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Closed => Self::Disconnected,
            ChannelError::TimedOut => Self::TimedOut,
            other => Self::Channel(other),
        }
    }
}

/// An answer to come.
pub(super) struct Pending(Receiver<Answer>);

impl Pending {
    pub(super) fn wait(self, deadline: Instant) -> Result<Answer, RequestError> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.0.recv_timeout(left).map_err(|error| match error {
            RecvTimeoutError::Timeout => RequestError::TimedOut,
            RecvTimeoutError::Disconnected => RequestError::Disconnected,
        })
    }
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    senders: HashMap<u64, SyncSender<Answer>>,
    closed: bool,
}

/// A connection that one thread reads and any thread sends requests on.
#[derive(Debug)]
pub(super) struct Link {
    channel: Channel,
    waiting: Mutex<Waiting>,
    pub(super) pager_pid: i32,
}

impl Link {
    pub(super) fn new(channel: Channel, pager_pid: i32) -> Self {
        Self { channel, waiting: Mutex::default(), pager_pid }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request; the reading thread delivers the answer.
    pub(super) fn send(
        &self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Pending, RequestError> {
        let mut waiting = self.waiting();
        if waiting.closed {
            return Err(RequestError::Disconnected);
        }
        waiting.next += 1;
        let number = waiting.next;
        self.channel.send(&ToPager { number, request }, fds)?;
        let (sender, receiver) = sync_channel(1);
        waiting.senders.insert(number, sender);
        Ok(Pending(receiver))
    }

    /// Reads what there is; hands answers to those who wait and returns the next event.
    pub(super) fn read(&self) -> Result<Option<Event>, ChannelError> {
        while let Some((message, fds)) = self.channel.try_receive::<FromPager>()? {
            match message {
                FromPager::Event(event) => return Ok(Some(event)),
                FromPager::Reply { number, reply } => {
                    let sender = self.waiting().senders.remove(&number);
                    // Nobody waits any more when the deadline passed first.
                    if let Some(sender) = sender {
                        let _ = sender.try_send((reply, fds));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Ends all requests on the way.
    pub(super) fn close(&self) {
        let mut waiting = self.waiting();
        waiting.closed = true;
        waiting.senders.clear();
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

/// A request on a connection that nobody reads yet; events in between are collected.
pub(super) fn ask(
    channel: &Channel,
    request: Request,
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
    events: &mut Vec<Event>,
) -> Result<Answer, RequestError> {
    channel.send(&ToPager { number: 0, request }, fds)?;
    loop {
        match channel.receive::<FromPager>(deadline)? {
            (FromPager::Reply { reply, .. }, fds) => return Ok((reply, fds)),
            (FromPager::Event(event), _) => events.push(event),
        }
    }
}
