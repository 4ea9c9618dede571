//! Errors as users see them: problem+json (RFC 9457) with the members `code`, `message` and
//! `error_code` besides, so that one body serves every client.
//!
//! This is the only place where an engine error gets a status code. `error_code` is a closed list:
//! the constants in this file and those of the guest agent.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use guest_agent::client::AgentError;
use serde::Serialize;
use utoipa::ToSchema;

use super::request_id;
use crate::engine::db::DbError;
use crate::engine::keys::{KeyError, Scope};
use crate::engine::lifecycle::RestoreError;
use crate::engine::quota::QuotaError;
use crate::engine::sandbox::State;
use crate::engine::{
    CreateError, NetworkChangeError, SandboxError, TransitionError, WorkspaceError,
};

/// A refusal: the members of RFC 9457, and `code`, `message` and `error_code` besides
#[derive(Debug, Serialize, ToSchema)]
pub struct Problem {
    /// `urn:rethaw:error:` and the `error_code`
    #[serde(rename = "type")]
    kind: String,
    /// The status in words
    title: &'static str,
    /// The HTTP status
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// The same as `message`
    detail: String,
    /// Path of the request
    instance: String,
    /// The same as `status`
    #[schema(minimum = 400, maximum = 599)]
    code: u16,
    /// For people: what was wrong, with the values, and what would be right
    #[schema(min_length = 1)]
    message: String,
    /// For programs: one of a closed list
    #[schema(pattern = "^[a-z_]+$")]
    error_code: String,
    /// The same as `X-Request-Id`
    request_id: String,
    /// State of the sandbox, when that is what forbids it
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    state: Option<State>,
}

/// Why one part of a reply is missing
#[derive(Debug, Serialize, ToSchema)]
pub struct Refusal {
    /// HTTP status that a reply of its own would have
    code: u16,
    /// For people
    message: String,
    /// For programs
    error_code: String,
}

/// An error on its way to the user.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    error_code: String,
    message: String,
    retry_after_seconds: Option<u32>,
    /// State of the sandbox that refused a transition.
    state: Option<State>,
}

impl ApiError {
    /// An error with its status, code and text.
    pub fn new(status: StatusCode, error_code: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            error_code: error_code.to_owned(),
            message: message.into(),
            retry_after_seconds: None,
            state: None,
        }
    }

    /// The same, with a hint when to come again.
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// The body or a parameter cannot be parsed.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed_request", message)
    }

    /// A field's value is not acceptable. `message` names the field and what would be right.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", message)
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// What kind it is.
    pub fn error_code(&self) -> &str {
        &self.error_code
    }

    /// Its text.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What a part of a reply shows for this error.
    pub fn into_part(self) -> Refusal {
        let Self { status, message, error_code, .. } = self;
        Refusal { code: status.as_u16(), message, error_code }
    }

    /// No such route.
    pub fn route_not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "route_not_found", "no such route; see /v1/info")
    }

    /// The route exists with other methods.
    pub fn method_not_allowed() -> Self {
        let message = "this route does not take this method; the Allow header lists those it does";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    /// A plain request to a route that is a WebSocket.
    pub fn websocket_needed(why: &str) -> Self {
        let message = format!("this route is a WebSocket: {why}");
        Self::new(StatusCode::UPGRADE_REQUIRED, "websocket_needed", message)
    }

    /// No or wrong key.
    pub fn unauthorized() -> Self {
        let message = "missing or wrong API key: send it as \"Authorization: Bearer KEY\" or \
                       \"X-API-Key: KEY\"";
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", message)
    }

    /// A key that may not do this.
    pub fn forbidden(key: &str, scope: Scope) -> Self {
        let scope = scope.as_str();
        let message = format!("the API key {key:?} lacks the scope {scope:?}");
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    /// No such template.
    pub fn template_not_found(name: &str) -> Self {
        let message = format!("no template {name:?}; GET /v1/templates lists them");
        Self::new(StatusCode::NOT_FOUND, "template_not_found", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let code = self.status.as_u16();
        let (request_id, instance) = request_id::current();
        let body = Problem {
            kind: format!("urn:rethaw:error:{}", self.error_code),
            title: self.status.canonical_reason().unwrap_or("Error"),
            status: code,
            detail: self.message.clone(),
            instance,
            code,
            message: self.message.clone(),
            error_code: self.error_code.clone(),
            request_id,
            state: self.state,
        };
        if self.status.is_server_error() {
            tracing::warn!(code = %self.error_code, "{}", self.message);
        }
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        let problem = HeaderValue::from_static("application/problem+json");
        headers.insert(header::CONTENT_TYPE, problem);
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<DbError> for ApiError {
    fn from(e: DbError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "state_store_failed", e.to_string())
    }
}

impl From<QuotaError> for ApiError {
    fn from(e: QuotaError) -> Self {
        let code = match e {
            QuotaError::Full { .. } => "quota_exceeded",
            QuotaError::TooFast { .. } => "too_many_claims",
        };
        let seconds = e.retry_after().as_secs_f64().ceil().max(1.0) as u32;
        Self::new(StatusCode::TOO_MANY_REQUESTS, code, e.to_string()).retry_after(seconds)
    }
}

impl From<KeyError> for ApiError {
    fn from(e: KeyError) -> Self {
        let message = e.to_string();
        match e {
            KeyError::NameTaken(_) => Self::new(StatusCode::CONFLICT, "name_taken", message),
            KeyError::NotFound(_) => Self::new(StatusCode::NOT_FOUND, "key_not_found", message),
            KeyError::Db(e) => e.into(),
        }
    }
}

impl From<SandboxError> for ApiError {
    fn from(e: SandboxError) -> Self {
        let message = e.to_string();
        match e {
            SandboxError::NotFound(_) => {
                Self::new(StatusCode::NOT_FOUND, "sandbox_not_found", message)
            }
            SandboxError::WrongState { state, .. } => {
                let e = Self::new(StatusCode::CONFLICT, "wrong_state", message);
                Self { state: Some(state), ..e }
            }
            SandboxError::Db(e) => e.into(),
        }
    }
}

impl From<CreateError> for ApiError {
    fn from(e: CreateError) -> Self {
        let message = e.to_string();
        match e {
            CreateError::NoTemplate(name) => Self::template_not_found(&name),
            CreateError::NotReady { .. } => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "template_not_ready", message)
                    .retry_after(5)
            }
            CreateError::Quota(e) => e.into(),
            CreateError::Restore(e) => e.into(),
            CreateError::Db(e) => e.into(),
        }
    }
}

impl From<RestoreError> for ApiError {
    fn from(e: RestoreError) -> Self {
        let message = e.to_string();
        let code = match e {
            RestoreError::Identity { .. } => "identity_not_proven",
            RestoreError::Key(_) => "key_unavailable",
            RestoreError::Network(_) => "network_failed",
            _ => "restore_failed",
        };
        Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message).retry_after(1)
    }
}

impl From<TransitionError> for ApiError {
    fn from(e: TransitionError) -> Self {
        match e {
            TransitionError::Sandbox(e) => e.into(),
            TransitionError::Quota(e) => e.into(),
            TransitionError::Restore(e) => e.into(),
            TransitionError::Db(e) => e.into(),
            TransitionError::Workspace(e @ WorkspaceError::NoTemplate(_)) => {
                let status = StatusCode::SERVICE_UNAVAILABLE;
                Self::new(status, "template_not_ready", e.to_string()).retry_after(5)
            }
            TransitionError::Workspace(e @ WorkspaceError::Key(_)) => {
                let status = StatusCode::SERVICE_UNAVAILABLE;
                Self::new(status, "key_unavailable", e.to_string()).retry_after(5)
            }
            TransitionError::Workspace(e) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "workspace_failed", e.to_string())
            }
        }
    }
}

impl From<NetworkChangeError> for ApiError {
    fn from(e: NetworkChangeError) -> Self {
        match e {
            NetworkChangeError::Sandbox(e) => e.into(),
            NetworkChangeError::Network(e) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "network_failed", e.to_string())
            }
        }
    }
}

impl From<AgentError> for ApiError {
    fn from(e: AgentError) -> Self {
        match e {
            AgentError::Refused { status, error_code, message } => {
                let status =
                    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                Self::new(status, &error_code, message)
            }
            AgentError::Timeout { .. } => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "guest_timeout", e.to_string())
            }
            other => Self::new(StatusCode::BAD_GATEWAY, "guest_unreachable", other.to_string()),
        }
    }
}
