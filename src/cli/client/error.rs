//! What can go wrong between this process and the service, in words for the person at the prompt.

use std::time::Duration;

use serde::Deserialize;

/// A call to the service failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The URL cannot be used.
    #[error("{url:?} is not a URL of a service: {reason}")]
    BadUrl {
        /// As given.
        url: String,
        /// What would be right.
        reason: String,
    },
    /// Nobody listens.
    #[error(
        "nothing listens at {url}: start the service with `rethaw serve`, or name another one \
         with --url or RETHAW_URL"
    )]
    NotRunning {
        /// The service.
        url: String,
    },
    /// No connection for another reason.
    #[error("no connection to {url}: {source}")]
    Connect {
        /// The service.
        url: String,
        /// Why.
        source: std::io::Error,
    },
    /// A deadline passed.
    #[error("{url}: no {what} within {} s", after.as_secs())]
    NoAnswer {
        /// The service.
        url: String,
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The connection was lost.
    #[error("the connection to {url} broke: {reason}")]
    Broken {
        /// The service.
        url: String,
        /// Why, as far as known.
        reason: String,
    },
    /// The service said no.
    #[error("{}", .0.text())]
    Api(Problem),
    /// Something that is not rethaw answered, or another version of it.
    #[error("{url} did not answer as rethaw does ({reason}): is it the right URL?")]
    Unexpected {
        /// The service.
        url: String,
        /// What was wrong.
        reason: String,
    },
}

impl ClientError {
    /// The service's `error_code`, when it was the service that said no.
    pub fn error_code(&self) -> Option<&str> {
        match self {
            Self::Api(problem) => Some(&problem.error_code),
            _ => None,
        }
    }
}

/// A refusal of the service, from its problem+json body.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problem {
    /// HTTP status.
    pub status: u16,
    /// One of the API's closed list.
    pub error_code: String,
    /// The reason, for people.
    pub message: String,
    /// When to try again.
    pub retry_after_seconds: Option<u64>,
    /// Whether this client sent a key.
    pub key_sent: bool,
}

#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    error_code: String,
    #[serde(default)]
    message: String,
}

impl Problem {
    /// Reads a body; `None` when it is not one of the API's.
    pub fn parse(status: u16, body: &[u8]) -> Option<Self> {
        let body: Body = serde_json::from_slice(body).ok()?;
        if body.message.is_empty() {
            return None;
        }
        let Body { error_code, message } = body;
        Some(Self { status, error_code, message, ..Self::default() })
    }

    /// The message, and what to do where that is known.
    fn text(&self) -> String {
        let mut text = self.message.clone();
        if self.status == 401 {
            // The service's own text speaks of headers, which nobody types here.
            text = if self.key_sent {
                "the service does not accept this API key".to_owned()
            } else {
                "the service wants an API key".to_owned()
            };
            text.push_str(
                ": give it with --api-key or RETHAW_API_KEY, or set RETHAW_HOME to the service's \
                 home folder and run as a user who can read api-key in it",
            );
        }
        if let Some(seconds) = self.retry_after_seconds {
            text.push_str(&format!(" (try again in {seconds} s)"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_speak_for_themselves() {
        let body = br#"{"type":"urn:x","status":404,"code":404,"message":"no sandbox \"x\"",
                        "error_code":"sandbox_not_found","request_id":"r"}"#;
        let problem = Problem::parse(404, body).unwrap();
        assert_eq!(problem.error_code, "sandbox_not_found");
        assert_eq!(ClientError::Api(problem).to_string(), "no sandbox \"x\"");
    }

    #[test]
    fn other_servers_are_not_mistaken_for_the_service() {
        assert_eq!(Problem::parse(404, b"<html>not found</html>"), None);
        assert_eq!(Problem::parse(500, b"{}"), None);
    }

    #[test]
    fn advice_comes_with_the_refusal() {
        let mut problem = Problem { status: 401, message: "m".into(), ..Problem::default() };
        assert!(problem.text().starts_with("the service wants an API key: give it with --api-key"));
        problem.key_sent = true;
        assert!(problem.text().contains("does not accept this API key"));
        let busy = Problem {
            status: 503,
            message: "template base is booting".into(),
            retry_after_seconds: Some(5),
            ..Problem::default()
        };
        assert_eq!(busy.text(), "template base is booting (try again in 5 s)");
    }
}
