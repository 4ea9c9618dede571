//! Commands: what starts them, what they are fed, and the frames they answer with.

use super::{Base64, Chunk};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// First line of `POST /exec`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecRequest {
    /// Program and arguments; the program is looked up in `PATH`.
    pub argv: Vec<String>,
    /// Variables on top of the default environment.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory; the user's home when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User to run as; `root` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The whole process group is killed after this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<f64>,
    /// Standard input, whole; closed after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Lines of [`ExecInput`] follow the request. Without this, standard input is `stdin` or empty.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stdin_stream: bool,
    /// Run on a terminal of this size; standard error then comes as standard output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pty: Option<PtySize>,
    /// The command outlives the request that started it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub background: bool,
    /// Keep standard input open for `POST /processes/{pid}/stdin`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stdin_open: bool,
    /// A name to find the process by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtySize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// A line after the first one of `POST /exec`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecInput {
    /// Bytes for standard input.
    Stdin(Base64),
    /// Standard input is closed; the value is ignored.
    Eof(bool),
    /// The terminal has a new size.
    Resize(PtySize),
    /// Send a signal, by name (`SIGTERM`), to the process group.
    Signal(String),
}

/// A line of the answer to `POST /exec` or `GET /processes/{pid}/stream`.
///
/// `started` comes first, then any number of output frames; exactly one `exit` or `error` ends it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ExecFrame {
    /// The program runs.
    Started(Started),
    /// Bytes of standard output.
    Stdout(Chunk),
    /// Bytes of standard error.
    Stderr(Chunk),
    /// Nothing happened for a while; the connection lives.
    Keepalive(Keepalive),
    /// The program has ended.
    Exit(ExecExit),
    /// The program could not be run to its end.
    Error(super::ErrorBody),
}

impl ExecFrame {
    /// Whether this is the last frame.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Exit(_) | Self::Error(_))
    }
}

/// Body of [`ExecFrame::Started`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Started {
    /// Process id in the guest.
    pub pid: u32,
}

/// Body of [`ExecFrame::Keepalive`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Keepalive {}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExecExit {
    /// Exit code; 128 plus the signal's number when a signal ended it.
    pub code: i32,
    /// Name of the signal that ended it.
    pub signal: Option<String>,
    /// It was killed because its time was up.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub timed_out: bool,
    /// From start to end.
    pub duration_ms: u64,
}

/// A command the agent started that still runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Process id in the guest.
    pub pid: u32,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables the request gave.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory.
    #[serde(default)]
    pub cwd: String,
    /// User it runs as.
    #[serde(default)]
    pub user: String,
    /// Name from the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// It has a terminal.
    #[serde(default)]
    pub pty: bool,
}

/// Answer to `GET /processes`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessList {
    /// The processes, by pid.
    pub items: Vec<ProcessInfo>,
}

/// Body of `POST /processes/{pid}/signal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalRequest {
    /// Name of the signal, `SIGTERM` for example.
    pub signal: String,
}

/// Body of `POST /processes/{pid}/stdin`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdinRequest {
    /// Bytes for standard input or the terminal.
    pub stdin: Base64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_look_as_documented() {
        let frame = ExecFrame::Started(Started { pid: 7 });
        assert_eq!(serde_json::to_string(&frame).unwrap(), r#"{"type":"started","pid":7}"#);
        let frame = ExecFrame::Stdout(Chunk::from_bytes(b"hi\n"));
        assert_eq!(
            serde_json::to_string(&frame).unwrap(),
            r#"{"type":"stdout","data":"hi\n","encoding":"utf8"}"#
        );
        let exit = ExecExit { code: 0, signal: None, timed_out: false, duration_ms: 3 };
        let json = serde_json::to_string(&ExecFrame::Exit(exit)).unwrap();
        assert_eq!(json, r#"{"type":"exit","code":0,"signal":null,"duration_ms":3}"#);
        let json = serde_json::to_string(&ExecFrame::Keepalive(Keepalive {})).unwrap();
        assert_eq!(json, r#"{"type":"keepalive"}"#);
    }

    #[test]
    fn inputs_look_as_documented() {
        let input: ExecInput = serde_json::from_str(r#"{"stdin":"eA=="}"#).unwrap();
        assert_eq!(input, ExecInput::Stdin(Base64(b"x".to_vec())));
        let input: ExecInput = serde_json::from_str(r#"{"eof":true}"#).unwrap();
        assert_eq!(input, ExecInput::Eof(true));
        let input: ExecInput = serde_json::from_str(r#"{"resize":{"cols":80,"rows":24}}"#).unwrap();
        assert_eq!(input, ExecInput::Resize(PtySize { cols: 80, rows: 24 }));
    }
}
