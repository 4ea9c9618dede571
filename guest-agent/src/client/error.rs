//! How a call to an agent can fail.

use crate::wire::ErrorBody;
use hyper::http::StatusCode;
use std::time::Duration;

/// Why a call to an agent failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No answer in time. The agent may still be working on it.
    #[error("agent: no answer to {call} within {deadline:?}")]
    Timeout {
        /// What was asked.
        call: String,
        /// How long it was given.
        deadline: Duration,
    },
    /// The connection could not be made, or broke.
    #[error("agent: connection lost: {0}")]
    Disconnected(String),
    /// The agent said no.
    #[error("agent: refused with {status} {error_code}: {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// One of [`crate::wire::codes`].
        error_code: String,
        /// The agent's words.
        message: String,
    },
    /// The other side does not speak as agreed.
    #[error("agent: protocol error: {0}")]
    Protocol(String),
}

impl AgentError {
    pub(super) fn from_hyper(error: &hyper::Error) -> Self {
        use std::error::Error as _;
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(inner) = source {
            text = format!("{text}: {inner}");
            source = inner.source();
        }
        if error.is_user() || error.is_parse() {
            Self::Protocol(text)
        } else {
            Self::Disconnected(text)
        }
    }

    /// From an answer that is none of success.
    pub fn refused(status: StatusCode, body: &[u8]) -> Self {
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(ErrorBody { error_code, message }) => {
                Self::Refused { status: status.as_u16(), error_code, message }
            }
            Err(_) => Self::Protocol(format!("status {status} without an error body")),
        }
    }
}
