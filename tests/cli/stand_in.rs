//! A service that says what a test wants it to say, and remembers what it was asked.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Bound on every read, so that a test that goes wrong ends.
const DEADLINE: Duration = Duration::from_secs(30);

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET /v1/sandboxes`
    pub line: String,
    /// Header lines, as sent.
    pub head: String,
    /// The body, chunks put together.
    pub body: Vec<u8>,
}

impl Request {
    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// What is said to it.
#[derive(Debug, Clone)]
pub struct Answer {
    /// `200 OK`
    pub status: &'static str,
    /// `application/json`
    pub media_type: &'static str,
    /// The body; sent piece by piece.
    pub pieces: Vec<Vec<u8>>,
    /// The connection ends in the middle of the body.
    pub cut_off: bool,
    /// Nothing more comes, and the connection stays open until the client ends it.
    pub hold: bool,
}

impl Answer {
    /// A JSON answer.
    pub fn json(status: &'static str, body: &serde_json::Value) -> Self {
        let pieces = vec![body.to_string().into_bytes()];
        Self { status, media_type: "application/json", pieces, cut_off: false, hold: false }
    }

    /// A refusal as the API words it.
    pub fn problem(status: &'static str, error_code: &str, message: &str) -> Self {
        let code: u16 = status[..3].parse().unwrap();
        let body =
            serde_json::json!({ "code": code, "error_code": error_code, "message": message });
        Self { media_type: "application/problem+json", ..Self::json(status, &body) }
    }

    /// The frames of a command.
    pub fn frames(lines: &[&str]) -> Self {
        let pieces = lines.iter().map(|line| format!("{line}\n").into_bytes()).collect();
        Self {
            status: "200 OK",
            media_type: "application/x-ndjson",
            pieces,
            cut_off: false,
            hold: false,
        }
    }

    /// Bytes of some kind.
    pub fn bytes(media_type: &'static str, bytes: &[u8]) -> Self {
        Self {
            status: "200 OK",
            media_type,
            pieces: vec![bytes.to_vec()],
            cut_off: false,
            hold: false,
        }
    }

    /// Nothing more to say.
    pub fn empty() -> Self {
        Self {
            status: "204 No Content",
            media_type: "",
            pieces: vec![],
            cut_off: false,
            hold: false,
        }
    }
}

/// The service.
pub struct StandIn {
    url: String,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl StandIn {
    /// One that gives `answer` to every request.
    pub fn new(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, answer) = (Arc::clone(&asked), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                // A client that goes away in the middle is what some tests are about.
                std::thread::spawn(move || converse(&stream, &log, &*answer));
            }
        });
        Self { url, asked }
    }

    /// What it was asked so far.
    pub fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }

    /// `rethaw` with this service for its own.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = rethaw(args);
        command.env("RETHAW_URL", &self.url).env("RETHAW_API_KEY", "the-key");
        command
    }

    /// Runs `rethaw` with this service for its own, standard input empty.
    pub fn rethaw(&self, args: &[&str]) -> Output {
        self.rethaw_with(args, None)
    }

    /// As [`StandIn::rethaw`], with a pipe for standard input where there is something in it.
    pub fn rethaw_with(&self, args: &[&str], input: Option<&[u8]>) -> Output {
        let mut child = self
            .command(args)
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            stdin.write_all(input).unwrap();
        }
        child.wait_with_output().unwrap()
    }
}

/// The program, with nothing of the tester's own settings.
pub fn rethaw(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rethaw"));
    command.args(args).env_remove("RETHAW_URL").env_remove("RETHAW_API_KEY");
    // Where there is no key file.
    command.env("RETHAW_HOME", "/nonexistent");
    command
}

fn converse(
    stream: &TcpStream,
    log: &Mutex<Vec<Request>>,
    answer: &dyn Fn(&Request) -> Answer,
) -> Option<()> {
    stream.set_read_timeout(Some(DEADLINE)).ok()?;
    let request = read(stream)?;
    log.lock().ok()?.push(request.clone());
    let answer = answer(&request);
    let mut out = stream;
    let Answer { status, media_type, pieces, cut_off, hold } = answer;
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: {media_type}\r\n");
    if status.starts_with("204") {
        return write!(out, "{head}\r\n").ok();
    }
    write!(out, "{head}transfer-encoding: chunked\r\n\r\n").ok()?;
    for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
        write!(out, "{:x}\r\n", piece.len()).ok()?;
        out.write_all(piece).and_then(|()| out.write_all(b"\r\n")).ok()?;
        out.flush().ok()?;
    }
    if hold {
        // The end of the client's side, or the deadline.
        let _ = (&mut out).read(&mut [0]);
    }
    if !cut_off {
        write!(out, "0\r\n\r\n").ok()?;
    }
    Some(())
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut input = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if input.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let (line, head) = head.split_once("\r\n")?;
    let line = line.trim_end_matches(" HTTP/1.1").to_owned();
    let lower = head.to_ascii_lowercase();
    let mut body = Vec::new();
    if lower.contains("transfer-encoding: chunked") {
        loop {
            let mut size = String::new();
            input.read_line(&mut size).ok()?;
            let size = u64::from_str_radix(size.trim(), 16).ok()?;
            (&mut input).take(size).read_to_end(&mut body).ok()?;
            let mut end = String::new();
            input.read_line(&mut end).ok()?;
            if size == 0 {
                break;
            }
        }
    } else if let Some(length) = lower.split("content-length: ").nth(1) {
        let length = length.split("\r\n").next()?.parse().ok()?;
        input.take(length).read_to_end(&mut body).ok()?;
    }
    Some(Request { line, head: head.to_owned(), body })
}
