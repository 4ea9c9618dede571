//! Answers what may be asked before HTTP/2; see [`crate::question`].

use super::ApiError;
use super::rewound::Rewound;
use crate::agent::Agent;
use crate::clock::Instant;
use crate::log::Line;
use crate::question::{self, Announced, HEAD, Kind};
use crate::{claim, identity};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::rc::Rc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

/// Answers questions until something else comes, and returns the stream with that on it.
///
/// # Errors
/// The stream ends or fails; a question that cannot be one.
pub async fn answer<S>(mut io: S, agent: &Rc<Agent>) -> io::Result<Rewound<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        let mut head = [0; HEAD];
        io.read_exact(&mut head).await?;
        let received = Instant::now()?;
        let Some(announced) = Announced::parse(head)? else {
            return Ok(Rewound::new(head, io));
        };
        let (name, body) = announced.read(&mut io).await?;
        let (status, answer) = match work(agent, announced.kind, &body, received).await {
            Ok(answer) => (200, answer),
            Err(error) => (error.status, error.into_body()),
        };
        question::answer(&mut io, status, &answer).await?;
        agent.log.write(&Line {
            request: std::str::from_utf8(&name).ok().filter(|name| !name.is_empty()),
            method: "POST",
            path: announced.kind.path(),
            status,
            micros: received.micros(),
        });
    }
}

async fn work(
    agent: &Rc<Agent>,
    kind: Kind,
    body: &[u8],
    received: Instant,
) -> Result<Vec<u8>, ApiError> {
    match kind {
        Kind::Identity => json(&identity::apply(agent, parse(body)?, received).await?),
        Kind::Claim => {
            agent.require_live()?;
            json(&claim::claim(agent, parse(body)?, received)?)
        }
        Kind::Resume => json(&claim::resume(agent, parse(body)?, received).await?),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|e| ApiError::invalid_json(&e))
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(value).map_err(|e| ApiError::internal(e.to_string()))
}
