//! The host's client: one connection to the agent of one VM, with HTTP/2 on it.
//!
//! Every call takes a deadline and every way it can fail is a variant of [`AgentError`]. The
//! client is cheap to clone; all clones share the connection, and [`AgentClient::closed`] resolves
//! when it is gone.

mod connect;
mod error;
mod exec;
mod link;

pub use error::AgentError;
pub use exec::{ExecSender, ExecStream};

use crate::question::Kind;
use crate::wire;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::http::{HeaderValue, Method, Request, Response, StatusCode};
use link::Link;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Error of a request body that is streamed to the agent.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// Body of a request to the agent. An `axum::body::Body` becomes one with `map_err` and
/// `boxed_unsync`.
pub type RequestBody = UnsyncBoxBody<Bytes, BodyError>;

/// Answers that are parsed as a whole are never larger than this.
const MAX_ANSWER: usize = 8 * 1024 * 1024;

/// Tells the request that a caller works for; see [`name_requests`].
static REQUEST: OnceLock<fn() -> Option<String>> = OnceLock::new();

/// Has every call carry the name of the request that its caller works for, for the agents' logs.
/// What counts is the first call, for the whole process.
pub fn name_requests(name: fn() -> Option<String>) {
    let _ = REQUEST.set(name);
}

/// A connection to one VM's agent.
#[derive(Debug, Clone)]
pub struct AgentClient {
    link: Arc<Link>,
}

/// A body that is already there.
pub fn full_body(bytes: impl Into<Bytes>) -> RequestBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

impl AgentClient {
    /// How the agent is; the cheapest call there is.
    ///
    /// # Errors
    /// See [`AgentError`]; the same for every call below.
    pub async fn health(&self, deadline: Duration) -> Result<wire::Health, AgentError> {
        self.call(Method::GET, "/health", None::<&()>, deadline).await
    }

    /// How the guest's boot went so far.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn boot(&self, deadline: Duration) -> Result<wire::BootReport, AgentError> {
        self.call(Method::GET, "/boot", None::<&()>, deadline).await
    }

    /// Waits until systemd has reached its target and has no jobs left.
    ///
    /// # Errors
    /// See [`AgentError`]; the guest's own timeout comes as `Refused` with 408.
    pub async fn boot_wait(&self, deadline: Duration) -> Result<wire::BootReport, AgentError> {
        // The guest gives up a little earlier, so that its own account arrives.
        let body = wire::BootWaitRequest { timeout_seconds: deadline.as_secs_f64() * 0.95 };
        self.call(Method::POST, "/boot/wait", Some(&body), deadline).await
    }

    /// Makes the guest ready for the template snapshot; only an identity brings it back.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn settle(
        &self,
        request: &wire::SettleRequest,
        deadline: Duration,
    ) -> Result<wire::SettleReport, AgentError> {
        self.call(Method::POST, "/settle", Some(request), deadline).await
    }

    /// Looks for what a template should not hand to every clone.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn lint(&self, deadline: Duration) -> Result<wire::LintReport, AgentError> {
        self.call(Method::POST, "/lint", None::<&()>, deadline).await
    }

    /// Freezes the workload for a pause or a fork.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn freeze(
        &self,
        request: &wire::FreezeRequest,
        deadline: Duration,
    ) -> Result<wire::SettleReport, AgentError> {
        self.call(Method::POST, "/freeze", Some(request), deadline).await
    }

    /// Applies an identity. The report of one that failed comes as `Ok`: only
    /// [`wire::IdentityReport::prove`] says whether it is one.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn identity(
        &self,
        request: &wire::IdentityRequest,
        deadline: Duration,
    ) -> Result<wire::IdentityReport, AgentError> {
        self.ask(Kind::Identity, request, deadline).await
    }

    /// Hands a parked VM to its user.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn claim(
        &self,
        request: &wire::ClaimRequest,
        deadline: Duration,
    ) -> Result<wire::ClaimReport, AgentError> {
        self.ask(Kind::Claim, request, deadline).await
    }

    /// Sets the guest's clock.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn clock(
        &self,
        request: &wire::ClockRequest,
        deadline: Duration,
    ) -> Result<wire::ClaimReport, AgentError> {
        self.call(Method::POST, "/clock", Some(request), deadline).await
    }

    /// Brings a paused sandbox back with the identity it had.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn resume(
        &self,
        request: &wire::ResumeRequest,
        deadline: Duration,
    ) -> Result<wire::ClaimReport, AgentError> {
        self.ask(Kind::Resume, request, deadline).await
    }

    /// Sends any request (path and query only, no authority) and returns the answer as it comes,
    /// whatever its status: for streaming files, archives and tunnels through.
    ///
    /// # Errors
    /// See [`AgentError`]. The deadline is the caller's.
    pub async fn send(
        &self,
        mut request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, AgentError> {
        if request.uri().authority().is_none() {
            let path = request.uri().path_and_query().map_or("/", |p| p.as_str());
            let uri = format!("http://agent{path}");
            *request.uri_mut() =
                uri.parse().map_err(|_| AgentError::Protocol(format!("invalid URI {uri:?}")))?;
        }
        if let Some(Ok(name)) = request_name().map(|name| HeaderValue::from_str(&name)) {
            request.headers_mut().insert(wire::REQUEST_ID, name);
        }
        let mut sender = self.link.http().await?;
        sender.send_request(request).await.map_err(|e| AgentError::from_hyper(&e))
    }

    /// Goes over to HTTP/2 in a moment, and not with the first call that needs it.
    pub fn start_http_after(&self, moment: Duration) {
        let link = Arc::clone(&self.link);
        tokio::spawn(async move {
            tokio::time::sleep(moment).await;
            // Where it fails, the first call will, too.
            drop(link.http().await);
        });
    }

    /// Ends the connection, for this client and all its clones.
    pub async fn hang_up(&self) {
        self.link.hang_up().await;
    }

    /// Whether this connection is on HTTP/2 now and another one would not have to be: see
    /// [`crate::question`].
    pub fn could_ask_anew(&self) -> bool {
        self.link.could_ask_anew()
    }

    /// Resolves when the connection is gone; at once if it is already. An identity or a resume that is
    /// to be asked for before HTTP/2 comes first.
    pub async fn closed(&self) {
        // Only HTTP/2 reads from a connection that nobody waits on.
        if self.link.http().await.is_err() {
            return;
        }
        // It cannot fail: the sender lives in the link.
        let _ = self.link.watch().wait_for(|gone| *gone).await;
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.link.is_closed()
    }

    /// A call that is asked before HTTP/2 where that still can be done.
    async fn ask<B: Serialize, R: DeserializeOwned>(
        &self,
        kind: Kind,
        body: &B,
        deadline: Duration,
    ) -> Result<R, AgentError> {
        let path = kind.path();
        let json = serde_json::to_vec(body)
            .map_err(|e| AgentError::Protocol(format!("request to {path}: {e}")))?;
        let name = request_name().unwrap_or_default();
        let answer = tokio::time::timeout(deadline, self.link.ask(kind, &name, &json))
            .await
            .map_err(|_| AgentError::Timeout { call: path.to_owned(), deadline })??;
        match answer {
            Some((200, body)) => serde_json::from_slice(&body)
                .map_err(|e| AgentError::Protocol(format!("answer of {path}: {e}"))),
            Some((status, body)) => Err(AgentError::refused(
                StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
                &body,
            )),
            None => self.call(Method::POST, path, Some(body), deadline).await,
        }
    }

    /// A typed call: JSON in, JSON out, one deadline over all of it.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn call<B: Serialize, R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
        deadline: Duration,
    ) -> Result<R, AgentError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body)
                .map_err(|e| AgentError::Protocol(format!("request to {path}: {e}")))?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .body(full_body(body))
            .map_err(|e| AgentError::Protocol(format!("request to {path}: {e}")))?;
        let work = async {
            let answer = self.send(request).await?;
            let status = answer.status();
            let bytes = collect(answer.into_body()).await?;
            if !status.is_success() {
                return Err(AgentError::refused(status, &bytes));
            }
            // An empty answer (204) is what a call for `()` gets.
            serde_json::from_slice(if bytes.is_empty() { b"null" } else { &bytes })
                .map_err(|e| AgentError::Protocol(format!("answer of {path}: {e}")))
        };
        tokio::time::timeout(deadline, work)
            .await
            .map_err(|_| AgentError::Timeout { call: path.to_owned(), deadline })?
    }
}

/// Name of the request that the caller works for.
fn request_name() -> Option<String> {
    REQUEST.get().and_then(|name| name())
}

async fn collect(body: Incoming) -> Result<Bytes, AgentError> {
    match Limited::new(body, MAX_ANSWER).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => Err(match error.downcast::<hyper::Error>() {
            Ok(error) => AgentError::from_hyper(&error),
            Err(error) => AgentError::Protocol(format!("answer body: {error}")),
        }),
    }
}
