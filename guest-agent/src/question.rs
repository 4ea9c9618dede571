//! Questions before HTTP/2: how an identity, a claim or a resume is asked for on a fresh session.
//!
//! They are what somebody waits for who wants a machine, and an emulated clone runs all code for the
//! first time: an HTTP/2 handshake, header tables and flow control are a third of what it would
//! execute. So the host may ask in this form first, and goes over to HTTP/2 on the same connection.
//! Whether an agent knows the form is told by the marker that it answers a session with (see
//! [`crate::session`]); the endpoints of the same names do the same.
//!
//! ```text
//! question: "RT1" kind(1) | length of the name (u16) | length of the body (u32) | name | body
//! answer:   status (u16) | length of the body (u32) | body
//! ```
//!
//! Numbers are little-endian, bodies JSON, the status is HTTP's, the name is the request's in the
//! service and the log (none: empty). HTTP/2 starts with "PRI", so the two cannot be confused.

use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes before a question's name; HTTP/2's preface is longer.
pub const HEAD: usize = 10;
const MAGIC: &[u8; 3] = b"RT1";
const ANSWER_HEAD: usize = 6;
/// Neither body is ever longer.
const MAX_BODY: usize = 1024 * 1024;
/// Nor the name.
const MAX_NAME: usize = 256;

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `POST /identity`.
    Identity,
    /// `POST /claim`.
    Claim,
    /// `POST /resume`.
    Resume,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Identity, Self::Claim, Self::Resume];

    fn letter(self) -> u8 {
        match self {
            Self::Identity => b'I',
            Self::Claim => b'C',
            Self::Resume => b'R',
        }
    }

    /// The endpoint that does the same.
    pub fn path(self) -> &'static str {
        match self {
            Self::Identity => "/identity",
            Self::Claim => "/claim",
            Self::Resume => "/resume",
        }
    }
}

/// A question whose head was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announced {
    /// What is asked.
    pub kind: Kind,
    name: usize,
    body: usize,
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.to_owned())
}

impl Announced {
    /// What a connection's first bytes announce; `None` is something else, HTTP/2 presumably.
    ///
    /// # Errors
    /// A question that cannot be one.
    pub fn parse(head: [u8; HEAD]) -> io::Result<Option<Self>> {
        if !head.starts_with(MAGIC) {
            return Ok(None);
        }
        let kind = Kind::ALL.into_iter().find(|kind| kind.letter() == head[3]);
        let name = usize::from(u16::from_le_bytes([head[4], head[5]]));
        let body = u32::from_le_bytes([head[6], head[7], head[8], head[9]]) as usize;
        match kind {
            Some(kind) if name <= MAX_NAME && body <= MAX_BODY => {
                Ok(Some(Self { kind, name, body }))
            }
            _ => Err(invalid("a question of no known kind, or too long")),
        }
    }

    /// Reads the rest: name and body.
    ///
    /// # Errors
    /// The stream ends or fails.
    pub async fn read<S>(self, io: &mut S) -> io::Result<(Vec<u8>, Vec<u8>)>
    where
        S: AsyncRead + Unpin,
    {
        let mut name = vec![0; self.name];
        io.read_exact(&mut name).await?;
        let mut body = vec![0; self.body];
        io.read_exact(&mut body).await?;
        Ok((name, body))
    }
}

/// Guest: writes an answer.
///
/// # Errors
/// The stream fails.
pub async fn answer<S>(io: &mut S, status: u16, body: &[u8]) -> io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    let mut bytes = Vec::with_capacity(ANSWER_HEAD + body.len());
    bytes.extend(status.to_le_bytes());
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(body);
    io.write_all(&bytes).await?;
    io.flush().await
}

/// Host: asks, and waits for the answer: its status and body. There is no deadline in here: the
/// caller has one.
///
/// # Errors
/// The stream ends or fails, or what comes is no answer.
#[cfg(any(feature = "client", test))]
pub async fn ask<S>(io: &mut S, kind: Kind, name: &str, body: &[u8]) -> io::Result<(u16, Vec<u8>)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let name = if name.len() <= MAX_NAME { name.as_bytes() } else { b"" };
    if body.len() > MAX_BODY {
        return Err(invalid("a question that is too long"));
    }
    let mut bytes = Vec::with_capacity(HEAD + name.len() + body.len());
    bytes.extend(MAGIC);
    bytes.push(kind.letter());
    bytes.extend((name.len() as u16).to_le_bytes());
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(name);
    bytes.extend_from_slice(body);
    io.write_all(&bytes).await?;
    io.flush().await?;
    let mut head = [0; ANSWER_HEAD];
    io.read_exact(&mut head).await?;
    let status = u16::from_le_bytes([head[0], head[1]]);
    let length = u32::from_le_bytes([head[2], head[3], head[4], head[5]]) as usize;
    if !(100..600).contains(&status) || length > MAX_BODY {
        return Err(invalid("what came is no answer"));
    }
    let mut body = vec![0; length];
    io.read_exact(&mut body).await?;
    Ok((status, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(kind: u8, name: u16, body: u32) -> [u8; HEAD] {
        let [n0, n1] = name.to_le_bytes();
        let [b0, b1, b2, b3] = body.to_le_bytes();
        [b'R', b'T', b'1', kind, n0, n1, b0, b1, b2, b3]
    }

    #[test]
    fn http_is_no_question_and_a_bad_question_is_refused() {
        assert_eq!(Announced::parse(*b"PRI * HTTP").unwrap(), None);
        let good = Announced::parse(head(b'R', 3, 5)).unwrap();
        assert_eq!(good, Some(Announced { kind: Kind::Resume, name: 3, body: 5 }));
        for bad in [head(b'X', 0, 0), head(b'I', 257, 0), head(b'I', 0, 1 << 21)] {
            assert!(Announced::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn what_is_asked_arrives_and_what_is_answered_comes_back() {
        let (mut host, mut guest) = tokio::io::duplex(7);
        let guest = async {
            let mut head = [0; HEAD];
            guest.read_exact(&mut head).await.unwrap();
            let announced = Announced::parse(head).unwrap().unwrap();
            assert_eq!(announced.kind, Kind::Identity);
            let (name, body) = announced.read(&mut guest).await.unwrap();
            assert_eq!((name.as_slice(), body.as_slice()), (&b"r-1"[..], &b"{\"a\":1}"[..]));
            answer(&mut guest, 409, b"no").await.unwrap();
        };
        let host = ask(&mut host, Kind::Identity, "r-1", b"{\"a\":1}");
        let (answer, ()) = tokio::join!(host, guest);
        assert_eq!(answer.unwrap(), (409, b"no".to_vec()));
    }

    #[tokio::test]
    async fn garbage_is_no_answer() {
        let (mut host, mut guest) = tokio::io::duplex(256);
        guest.write_all(&[0xff; 64]).await.unwrap();
        assert!(ask(&mut host, Kind::Resume, "", b"{}").await.is_err());
    }
}
