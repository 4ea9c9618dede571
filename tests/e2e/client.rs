//! An HTTP client that is as plain as can be, and what came back.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::http::{HeaderMap, Method, Request, Response};
use hyper_util::client::legacy::Client as Pooled;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// No answer may take longer.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Ends a wait that would not end by itself.
pub async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(done) => done,
        Err(_) => panic!("{what}: not done after {DEADLINE:?}"),
    }
}

/// A client of one service.
#[derive(Debug, Clone)]
pub struct Client {
    url: String,
    key: Option<String>,
    pooled: Pooled<HttpConnector, Full<Bytes>>,
}

/// An answer, whole.
#[derive(Debug)]
pub struct Reply {
    pub asked: String,
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Client {
    pub fn new(url: String, key: Option<String>) -> Self {
        Self { url, key, pooled: Pooled::builder(TokioExecutor::new()).build_http() }
    }

    /// The same service, another key.
    pub fn with_key(&self, key: Option<&str>) -> Self {
        Self { key: key.map(str::to_owned), ..self.clone() }
    }

    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Sends a request and gives what comes back as it comes.
    pub async fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Response<Incoming> {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).unwrap();
        within(path, self.pooled.request(request)).await.unwrap()
    }

    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Reply {
        let (head, body) = self.open(method, path, headers, body).await.into_parts();
        let body = within(path, body.collect()).await.unwrap().to_bytes();
        let asked = format!("{method} {path}");
        Reply { asked, status: head.status.as_u16(), headers: head.headers, body }
    }

    /// Sends a request that may never be answered, because the service ends under it.
    pub async fn post_unanswered(&self, path: &str, body: &Value) -> Option<u16> {
        self.unanswered(path, body, None).await
    }

    /// The same with an idempotency key.
    pub async fn post_keyed_unanswered(&self, key: &str, path: &str, body: &Value) -> Option<u16> {
        self.unanswered(path, body, Some(key)).await
    }

    async fn unanswered(&self, path: &str, body: &Value, idempotency: Option<&str>) -> Option<u16> {
        let mut request = Request::builder().method(Method::POST);
        if let Some(idempotency) = idempotency {
            request = request.header("idempotency-key", idempotency);
        }
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let (path, request) = match path.strip_prefix("DELETE ") {
            Some(path) => (path, request.method(Method::DELETE)),
            None => (path, request),
        };
        let request = request.uri(format!("{}{path}", self.url));
        let request = request.body(Full::new(Bytes::from(body.to_string()))).unwrap();
        let reply = within(path, self.pooled.request(request)).await;
        reply.ok().map(|reply| reply.status().as_u16())
    }

    pub async fn json(&self, method: &str, path: &str, body: &Value) -> Reply {
        self.send(method, path, &[("content-type", "application/json")], body.to_string()).await
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], "").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.json("POST", path, body).await
    }

    pub async fn delete(&self, path: &str) -> Reply {
        self.send("DELETE", path, &[], "").await
    }
}

impl Reply {
    /// Its body, which must be JSON.
    pub fn value(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{}: {e}: {}", self.asked, self.text()))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body of an answer with this status; anything else fails the test.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}: {}", self.asked, self.text());
        if self.body.is_empty() { Value::Null } else { self.value() }
    }

    /// A refusal: every part of the contract is looked at, whatever the test is about.
    #[track_caller]
    pub fn refused(&self, status: u16, error_code: &str) -> String {
        assert_eq!(self.status, status, "{}: {}", self.asked, self.text());
        let kind = self.headers.get("content-type").map(|v| v.to_str().unwrap());
        assert_eq!(kind, Some("application/problem+json"), "{}", self.asked);
        let body = self.value();
        assert_eq!(body["error_code"], error_code, "{}: {body}", self.asked);
        assert_eq!(body["code"], status, "{}: {body}", self.asked);
        assert_eq!(body["status"], status, "{}: {body}", self.asked);
        let id = self.headers.get("x-request-id").map(|v| v.to_str().unwrap());
        assert_eq!(body["request_id"].as_str(), id, "{}: {body}", self.asked);
        assert!(id.is_some_and(|id| !id.is_empty()), "{}: {body}", self.asked);
        let message = body["message"].as_str().unwrap_or_default().to_owned();
        assert!(!message.is_empty(), "{}: {body}", self.asked);
        assert_eq!(body["detail"], message.as_str(), "{}: {body}", self.asked);
        message
    }
}
