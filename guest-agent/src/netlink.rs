//! Netlink without a library: requests are built and answers are taken apart by hand, because a
//! restore has room for a dozen messages and for nothing else. The host's side of a sandbox's
//! network (links and nftables) speaks through the same few lines.

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
    setsockopt, socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::TimeVal;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;
const ERROR: u16 = libc::NLMSG_ERROR as u16;
/// Marks an attribute that holds others.
const NESTED: u16 = libc::NLA_F_NESTED as u16;
const DONE: u16 = libc::NLMSG_DONE as u16;
/// The kernel answers at once; this is for a kernel that does not.
const TIMEOUT_SECONDS: i64 = 2;
/// Dumps come in pieces of at most this: as long as the kernel makes them.
const BUFFER: usize = 32 * 1024;
/// A kernel that was never offered more makes pieces of less than a page, which it has at hand.
const SMALL_BUFFER: usize = 4096;

/// A request being built.
#[derive(Debug)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A request of `kind` with `flags` besides those every request has.
    pub fn new(kind: u16, flags: i32) -> Self {
        let mut bytes = Vec::with_capacity(128);
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        Self { bytes }
    }

    /// Appends the fixed part that follows the header.
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.bytes.extend(payload);
        self.align();
        self
    }

    /// Appends an attribute.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        append(&mut self.bytes, kind, value);
        self
    }

    /// Appends an attribute that holds others.
    pub fn nested(self, kind: u16, inner: &Attributes) -> Self {
        self.attribute(kind | NESTED, &inner.bytes)
    }

    fn demand_answer(&mut self) {
        let flags = u16_at(&self.bytes, 6).unwrap_or(0) | libc::NLM_F_ACK as u16;
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn append(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend(((ATTRIBUTE + value.len()) as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// What is inside an attribute that holds others.
#[derive(Debug, Clone, Default)]
pub struct Attributes {
    bytes: Vec<u8>,
}

impl Attributes {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the fixed part that some kinds have before their attributes.
    pub fn fixed(mut self, payload: &[u8]) -> Self {
        self.bytes.extend(payload);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Appends an attribute.
    pub fn put(mut self, kind: u16, value: &[u8]) -> Self {
        append(&mut self.bytes, kind, value);
        self
    }

    /// Appends an attribute that holds others.
    pub fn nest(self, kind: u16, inner: &Self) -> Self {
        self.put(kind | NESTED, &inner.bytes)
    }
}

/// A message of an answer: its kind, and what follows the header.
#[derive(Debug)]
pub struct Message {
    /// Kind.
    pub kind: u16,
    /// Fixed part and attributes.
    pub body: Vec<u8>,
}

impl Message {
    /// The attributes that follow a fixed part of this size.
    pub fn attributes(&self, fixed: usize) -> impl Iterator<Item = (u16, &[u8])> {
        attributes(self.body.get(fixed.next_multiple_of(4)..).unwrap_or_default())
    }
}

/// The attributes in `bytes`; kinds come without the mark of those that hold others.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & !NESTED;
        let value = rest.get(ATTRIBUTE..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The 32-bit number at `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A netlink socket.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens a socket for one of netlink's families.
    ///
    /// # Errors
    /// The kernel does not have it.
    pub fn open(protocol: SockProtocol) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(TIMEOUT_SECONDS, 0))?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// The same for questions with short answers: nothing large is allocated, on either side.
    ///
    /// # Errors
    /// The kernel does not have it.
    pub fn open_small(protocol: SockProtocol) -> io::Result<Self> {
        Ok(Self { buffer: vec![0; SMALL_BUFFER], ..Self::open(protocol)? })
    }

    /// Sends a request that changes something and waits for the kernel's word.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn change(&mut self, mut request: Request) -> io::Result<()> {
        request.demand_answer();
        self.send(request)?;
        self.receive(|_| {})
    }

    /// Sends a request and collects the answer: one message, or all of a dump.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn ask(&mut self, mut request: Request) -> io::Result<Vec<Message>> {
        let flags = u16_at(&request.bytes, 6).unwrap_or(0);
        // A dump ends by itself; a single answer is followed by an acknowledgement.
        if i32::from(flags) & libc::NLM_F_DUMP == 0 {
            request.demand_answer();
        }
        self.send(request)?;
        let mut messages = Vec::new();
        self.receive(|message| messages.push(message))?;
        Ok(messages)
    }

    /// Sends requests that take effect together or not at all, `first` and `last` around them, as
    /// nftables wants it. The error names the request (counted from 0) that was refused, where it
    /// was one of them.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn batch(
        &mut self,
        first: Request,
        requests: Vec<Request>,
        last: Request,
    ) -> Result<(), (Option<usize>, io::Error)> {
        let (begin, count) = (self.sequence + 1, requests.len());
        let mut bytes = Vec::new();
        for (place, mut request) in
            std::iter::once(first).chain(requests).chain(std::iter::once(last)).enumerate()
        {
            if (1..=count).contains(&place) {
                request.demand_answer();
            }
            bytes.extend(self.numbered(request));
        }
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.socket.as_raw_fd(), &bytes, &kernel, MsgFlags::empty())
            .map_err(|e| (None, e.into()))?;
        let mut refused = None;
        let mut answered = 0;
        while answered < count {
            let done = self.datagram(|sequence, kind, body| {
                if kind != ERROR || sequence < begin {
                    return Ok(());
                }
                let error = acknowledgement(body);
                let place = (sequence - begin) as usize;
                if (1..=count).contains(&place) {
                    answered += 1;
                    if let (Err(error), None) = (error, &refused) {
                        refused = Some((Some(place - 1), error));
                    }
                    return Ok(());
                }
                // Of the whole: nothing follows.
                error
            });
            done.map_err(|e| refused.take().unwrap_or((None, e)))?;
        }
        refused.map_or(Ok(()), Err)
    }

    fn numbered(&mut self, mut request: Request) -> Vec<u8> {
        self.sequence += 1;
        let length = request.bytes.len() as u32;
        request.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        request.bytes[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        request.bytes
    }

    fn send(&mut self, request: Request) -> io::Result<()> {
        let bytes = self.numbered(request);
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.socket.as_raw_fd(), &bytes, &kernel, MsgFlags::empty())?;
        Ok(())
    }

    fn receive(&mut self, mut take: impl FnMut(Message)) -> io::Result<()> {
        let wanted = self.sequence;
        let mut done = false;
        while !done {
            self.datagram(|sequence, kind, body| {
                match kind {
                    // Left over from a request that was given up.
                    _ if sequence != wanted => {}
                    DONE => done = true,
                    ERROR => {
                        done = true;
                        acknowledgement(body)?;
                    }
                    kind => take(Message { kind, body: body.to_vec() }),
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Receives once, and gives every message's sequence number, kind and body.
    fn datagram(
        &mut self,
        mut take: impl FnMut(u32, u16, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let n = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
        let mut rest = &self.buffer[..n];
        while rest.len() >= HEADER {
            let length = u32_at(rest, 0).ok_or_else(malformed)? as usize;
            let body = rest.get(HEADER..length).ok_or_else(malformed)?;
            let kind = u16_at(rest, 4).ok_or_else(malformed)?;
            let sequence = u32_at(rest, 8).ok_or_else(malformed)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            take(sequence, kind, body)?;
        }
        Ok(())
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "netlink message")
}

/// What a message of kind `ERROR` says.
fn acknowledgement(body: &[u8]) -> io::Result<()> {
    match u32_at(body, 0).ok_or_else(malformed)? as i32 {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}
