//! The feed `GET /v1/events`, put together to one state.

use std::time::Duration;

use bytes::Bytes;
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cli::client::{Client, ClientError, Frames, QUICK};

/// The service sends a point every two seconds.
const SILENCE: Duration = Duration::from_secs(30);
/// Longest event taken.
const MAX_EVENT: usize = 32 << 20;

/// What an event was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    /// Something changed.
    Change,
    /// An interval ended.
    Interval,
}

/// An open feed.
#[derive(Debug)]
pub struct Feed {
    client: Client,
    frames: Frames,
    buffer: Vec<u8>,
    event: String,
    state: State,
}

impl Feed {
    /// Opens it.
    pub async fn open(client: &Client) -> Result<Self, ClientError> {
        let reply = client.send_json(Method::GET, "/v1/events", None::<&Value>, QUICK).await?;
        Ok(Self {
            frames: client.frames(reply),
            client: client.clone(),
            buffer: Vec::new(),
            event: String::new(),
            state: State::default(),
        })
    }

    /// All that it told so far.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Waits for the next event; none at the end. Safe to give up and call again.
    pub async fn next(&mut self) -> Result<Option<Update>, ClientError> {
        loop {
            while let Some(at) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=at).collect();
                if let Some(update) = self.line(&String::from_utf8_lossy(&line))? {
                    return Ok(Some(update));
                }
            }
            if self.buffer.len() > MAX_EVENT {
                return Err(self.client.unexpected("an event without an end"));
            }
            let Some(bytes) = self.frames.next(SILENCE).await? else { return Ok(None) };
            self.take(&bytes);
        }
    }

    fn take(&mut self, bytes: &Bytes) {
        self.buffer.extend_from_slice(bytes);
    }

    fn line(&mut self, line: &str) -> Result<Option<Update>, ClientError> {
        let line = line.trim_end_matches(['\r', '\n']);
        if let Some(name) = line.strip_prefix("event:") {
            name.trim().clone_into(&mut self.event);
        }
        let Some(data) = line.strip_prefix("data:") else { return Ok(None) };
        let value = serde_json::from_str(data);
        let value = value.map_err(|e| self.client.unexpected(&format!("event: {e}")))?;
        Ok(Some(self.state.apply(&self.event, value)))
    }
}

/// What the feed has told, in the form of `GET /v1/stats`.
#[derive(Debug, Default)]
pub struct State(Value);

impl State {
    /// From a whole reply.
    pub fn new(stats: Value) -> Self {
        Self(stats)
    }

    /// Whether nothing was told yet.
    pub fn is_empty(&self) -> bool {
        self.0.is_null()
    }

    fn apply(&mut self, event: &str, value: Value) -> Update {
        match event {
            "snapshot" => self.0 = value,
            "point" => {
                let capacity = self.0["history"]["capacity"].as_u64().unwrap_or(1) as usize;
                if let Some(points) = self.0["history"]["points"].as_array_mut() {
                    points.push(value);
                    let surplus = points.len().saturating_sub(capacity);
                    points.drain(..surplus);
                }
                return Update::Interval;
            }
            // A newer service may tell more than this program knows.
            part => self.0[part] = value,
        }
        Update::Change
    }

    /// As one JSON document, of the history the last point only.
    pub fn report(&self) -> Value {
        let mut report =
            json!({ "point": self.0["history"]["points"].as_array().and_then(|p| p.last()) });
        for (name, value) in self.0.as_object().into_iter().flatten() {
            if name != "history" {
                report[name] = value.clone();
            }
        }
        report
    }

    /// Typed, for the picture.
    pub fn parse<T: for<'de> Deserialize<'de>>(&self) -> serde_json::Result<T> {
        T::deserialize(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_make_one_state() {
        let mut state = State::default();
        assert!(state.is_empty());
        let snapshot = json!({
            "pools": [], "history": { "capacity": 2, "points": [{ "seq": 1 }] },
        });
        assert_eq!(state.apply("snapshot", snapshot), Update::Change);
        assert_eq!(state.apply("pools", json!([{ "ready": 3 }])), Update::Change);
        for seq in 2..5 {
            assert_eq!(state.apply("point", json!({ "seq": seq })), Update::Interval);
        }
        assert_eq!(state.0["history"]["points"], json!([{ "seq": 3 }, { "seq": 4 }]));
        let report = state.report();
        assert_eq!(report, json!({ "pools": [{ "ready": 3 }], "point": { "seq": 4 } }));
    }
}
