//! The HTTP client of all subcommands: one connection per request, every wait with a deadline.

mod body;
mod endpoint;
mod error;
mod query;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use body::{BoxBody, Frames, Next, counted, empty, full, reason};
pub use endpoint::{Endpoint, Stream};
pub use error::{ClientError, Problem};
pub use query::{encode, segment};

use super::{Global, home};

/// For requests that only read or change a record.
pub const QUICK: Duration = Duration::from_secs(30);
/// For requests that make a VM work: a restore without a pool, a pause with all its memory.
pub const SLOW: Duration = Duration::from_secs(300);
/// Longest silence while bytes should flow.
pub const IDLE: Duration = Duration::from_secs(60);
/// Longest JSON reply; a page of a hundred sandboxes is a tenth of it.
const MAX_JSON: usize = 32 << 20;

/// The service, as the command line sees it.
#[derive(Debug, Clone)]
pub struct Client {
    endpoint: Endpoint,
    key: Option<String>,
}

impl Client {
    /// From the global flags; the key file is read when no key was given.
    pub fn new(global: &Global) -> Result<Self, ClientError> {
        let endpoint = Endpoint::parse(&global.url)?;
        let key = global.api_key.clone().filter(|key| !key.is_empty()).or_else(|| {
            let named = std::env::var_os("RETHAW_HOME").filter(|dir| !dir.is_empty());
            let dir = named.map(Into::into).or_else(|| home::default_home().ok())?;
            home::read_key(&dir)
        });
        Ok(Self { endpoint, key })
    }

    /// The service's URL, for messages.
    pub fn url(&self) -> &str {
        &self.endpoint.url
    }

    /// Value of the `Host` header.
    pub fn authority(&self) -> &str {
        &self.endpoint.authority
    }

    /// A bare connection, for a protocol of its own.
    pub async fn connect(&self) -> Result<Box<dyn Stream>, ClientError> {
        self.endpoint.connect().await
    }

    /// A request to `path`, with what every request carries.
    pub fn request(&self, method: Method, path: &str) -> hyper::http::request::Builder {
        let mut builder = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.endpoint.prefix))
            .header(header::HOST, &self.endpoint.authority)
            .header(header::USER_AGENT, concat!("rethaw/", env!("CARGO_PKG_VERSION")));
        if let Some(key) = &self.key
            && let Ok(mut value) = HeaderValue::from_str(&format!("Bearer {key}"))
        {
            value.set_sensitive(true);
            builder = builder.header(header::AUTHORIZATION, value);
        }
        builder
    }

    /// Sends a request; a refusal of the service is an error.
    pub async fn send(
        &self,
        request: Request<BoxBody>,
        deadline: Duration,
    ) -> Result<Response<Incoming>, ClientError> {
        self.send_counted(request, deadline, &Arc::default()).await
    }

    /// As [`Client::send`], but the deadline starts anew whenever `sent` has grown: for uploads.
    pub async fn send_counted(
        &self,
        request: Request<BoxBody>,
        deadline: Duration,
        sent: &Arc<AtomicU64>,
    ) -> Result<Response<Incoming>, ClientError> {
        let io = TokioIo::new(self.endpoint.connect().await?);
        let handshake = hyper::client::conn::http1::handshake(io).await;
        let (mut sender, connection) = handshake.map_err(|e| self.broken(&e))?;
        tokio::spawn(connection);
        let answer = sender.send_request(request);
        tokio::pin!(answer);
        let mut before = sent.load(Ordering::Relaxed);
        let response = loop {
            match tokio::time::timeout(deadline, &mut answer).await {
                Ok(result) => break result.map_err(|e| self.broken(&e))?,
                Err(_) => {
                    let now = sent.load(Ordering::Relaxed);
                    if now == before {
                        let url = self.endpoint.url.clone();
                        return Err(ClientError::NoAnswer { url, what: "answer", after: deadline });
                    }
                    before = now;
                }
            }
        };
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(self.refusal(response).await)
        }
    }

    /// Sends JSON, if any, and reads JSON.
    pub async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + ?Sized)>,
        deadline: Duration,
    ) -> Result<T, ClientError> {
        let response = self.send_json(method, path, body, deadline).await?;
        let bytes = self.collect(response).await?;
        serde_json::from_slice(&bytes).map_err(|e| self.unexpected(&e.to_string()))
    }

    /// Sends JSON, if any; the answer's body, if any, is not read.
    pub async fn send_json(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + ?Sized)>,
        deadline: Duration,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut builder = self.request(method, path);
        let body = match body {
            Some(value) => {
                builder = builder.header(header::CONTENT_TYPE, "application/json");
                let text =
                    serde_json::to_vec(value).map_err(|e| self.unexpected(&e.to_string()))?;
                full(text)
            }
            None => empty(),
        };
        let request = builder.body(body).map_err(|e| self.bad_request(&e))?;
        self.send(request, deadline).await
    }

    /// `GET` of one JSON value.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(Method::GET, path, None::<&Value>, QUICK).await
    }

    /// A whole reply, in memory.
    pub async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(response.into_body(), MAX_JSON).collect();
        match tokio::time::timeout(IDLE, body).await {
            Ok(Ok(collected)) => Ok(collected.to_bytes()),
            Ok(Err(e)) => Err(self.broken(&*e)),
            Err(_) => {
                let url = self.endpoint.url.clone();
                Err(ClientError::NoAnswer { url, what: "end of the reply", after: IDLE })
            }
        }
    }

    /// The bytes of a reply as they come.
    pub fn frames(&self, response: Response<Incoming>) -> Frames {
        Frames::new(response.into_body(), self.endpoint.url.clone())
    }

    async fn refusal(&self, response: Response<Incoming>) -> ClientError {
        let status = response.status();
        let seconds = |value: &HeaderValue| value.to_str().ok()?.parse().ok();
        let retry_after_seconds = response.headers().get(header::RETRY_AFTER).and_then(seconds);
        let body = match self.collect(response).await {
            Ok(body) => body,
            Err(e) => return e,
        };
        self.refused(status, &body, retry_after_seconds)
    }

    /// What a reply with an error status means.
    pub fn refused(&self, status: StatusCode, body: &[u8], retry: Option<u64>) -> ClientError {
        match Problem::parse(status.as_u16(), body) {
            Some(problem) => ClientError::Api(Problem {
                retry_after_seconds: retry,
                key_sent: self.key.is_some(),
                ..problem
            }),
            None => self.unexpected(&format!("status {status} without a reason")),
        }
    }

    /// The reply is not what the API promises.
    pub fn unexpected(&self, reason: &str) -> ClientError {
        ClientError::Unexpected { url: self.endpoint.url.clone(), reason: reason.to_owned() }
    }

    /// The request cannot be built, which only a path with odd bytes can cause.
    pub fn bad_request(&self, e: &hyper::http::Error) -> ClientError {
        ClientError::BadUrl { url: self.endpoint.url.clone(), reason: e.to_string() }
    }

    fn broken(&self, e: &(dyn std::error::Error + 'static)) -> ClientError {
        ClientError::Broken { url: self.endpoint.url.clone(), reason: body::reason(e) }
    }
}
