//! Errors as users see them: problem+json (RFC 9457) with the members `code`, `message` and
//! `error_code` besides, so that one body serves every client.
//!
//! This is the only place where an engine error gets a status code. `error_code` is a closed list,
//! [`ErrorCode`].

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use guest_agent::client::AgentError;
use serde::Serialize;
use snapshotter::vmm::VmmError;
use utoipa::ToSchema;

pub use super::error_code::ErrorCode;
use super::request_id;
use crate::engine::budget::NoRoom;
use crate::engine::db::DbError;
use crate::engine::gc::GcError;
use crate::engine::inputs::InputError;
use crate::engine::keys::{KeyError, Scope};
use crate::engine::lifecycle::RestoreError;
use crate::engine::quota::QuotaError;
use crate::engine::sandbox::State;
use crate::engine::templates::{BuildRequestError, DeleteError};
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
    error_code: ErrorCode,
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
    error_code: ErrorCode,
}

/// An error on its way to the user.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    error_code: ErrorCode,
    message: String,
    retry_after_seconds: Option<u32>,
    /// State of the sandbox that refused a transition.
    state: Option<State>,
}

impl ApiError {
    /// An error with its status, code and text.
    pub fn new(status: StatusCode, error_code: ErrorCode, message: impl Into<String>) -> Self {
        Self { status, error_code, message: message.into(), retry_after_seconds: None, state: None }
    }

    /// The same, with a hint when to come again.
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// The body or a parameter cannot be parsed.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, ErrorCode::MALFORMED_REQUEST, message)
    }

    /// A field's value is not acceptable. `message` names the field and what would be right.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, ErrorCode::INVALID_FIELD, message)
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// What kind it is.
    pub fn error_code(&self) -> &'static str {
        self.error_code.as_str()
    }

    /// The same with another status.
    pub fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
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
        Self::new(StatusCode::NOT_FOUND, ErrorCode::ROUTE_NOT_FOUND, "no such route; see /v1/info")
    }

    /// The route exists with other methods.
    pub fn method_not_allowed() -> Self {
        let message = "this route does not take this method; the Allow header lists those it does";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, ErrorCode::METHOD_NOT_ALLOWED, message)
    }

    /// A plain request to a route that is a WebSocket.
    pub fn websocket_needed(why: &str) -> Self {
        let message = format!("this route is a WebSocket: {why}");
        Self::new(StatusCode::UPGRADE_REQUIRED, ErrorCode::WEBSOCKET_NEEDED, message)
    }

    /// No or wrong key.
    pub fn unauthorized() -> Self {
        let message = "missing or wrong API key: send it as \"Authorization: Bearer KEY\" or \
                       \"X-API-Key: KEY\"";
        Self::new(StatusCode::UNAUTHORIZED, ErrorCode::UNAUTHORIZED, message)
    }

    /// A key that may not do this.
    pub fn forbidden(key: &str, scope: Scope) -> Self {
        let scope = scope.as_str();
        let message = format!("the API key {key:?} lacks the scope {scope:?}");
        Self::new(StatusCode::FORBIDDEN, ErrorCode::FORBIDDEN, message)
    }

    /// No such template.
    pub fn template_not_found(name: &str) -> Self {
        let message = format!("no template {name:?}; GET /v1/templates lists them");
        Self::new(StatusCode::NOT_FOUND, ErrorCode::TEMPLATE_NOT_FOUND, message)
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
            error_code: self.error_code,
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
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::STATE_STORE_FAILED, e.to_string())
    }
}

impl From<QuotaError> for ApiError {
    fn from(e: QuotaError) -> Self {
        let code = match e {
            QuotaError::Full { .. } => ErrorCode::QUOTA_EXCEEDED,
            QuotaError::TooFast { .. } => ErrorCode::TOO_MANY_CLAIMS,
        };
        let seconds = e.retry_after().as_secs_f64().ceil().max(1.0) as u32;
        Self::new(StatusCode::TOO_MANY_REQUESTS, code, e.to_string()).retry_after(seconds)
    }
}

impl From<KeyError> for ApiError {
    fn from(e: KeyError) -> Self {
        let message = e.to_string();
        match e {
            KeyError::NameTaken(_) => {
                Self::new(StatusCode::CONFLICT, ErrorCode::NAME_TAKEN, message)
            }
            KeyError::NotFound(_) => {
                Self::new(StatusCode::NOT_FOUND, ErrorCode::KEY_NOT_FOUND, message)
            }
            KeyError::Db(e) => e.into(),
        }
    }
}

impl From<SandboxError> for ApiError {
    fn from(e: SandboxError) -> Self {
        let message = e.to_string();
        match e {
            SandboxError::NotFound(_) => {
                Self::new(StatusCode::NOT_FOUND, ErrorCode::SANDBOX_NOT_FOUND, message)
            }
            SandboxError::WrongState { state, .. } => {
                let e = Self::new(StatusCode::CONFLICT, ErrorCode::WRONG_STATE, message);
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
                Self::new(StatusCode::SERVICE_UNAVAILABLE, ErrorCode::TEMPLATE_NOT_READY, message)
                    .retry_after(5)
            }
            CreateError::Snapshot(e) => e.into(),
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
            RestoreError::Identity { .. } => ErrorCode::IDENTITY_NOT_PROVEN,
            RestoreError::Key(_) => ErrorCode::KEY_UNAVAILABLE,
            RestoreError::Network(_) => ErrorCode::NETWORK_FAILED,
            _ => ErrorCode::RESTORE_FAILED,
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
            TransitionError::Workspace(e) => e.into(),
        }
    }
}

impl From<WorkspaceError> for ApiError {
    fn from(e: WorkspaceError) -> Self {
        let (status, code) = match e {
            WorkspaceError::NoRoom(e) => return e.into(),
            WorkspaceError::Vmm(VmmError::Unsupported(_)) => {
                (StatusCode::CONFLICT, ErrorCode::SNAPSHOT_UNSUPPORTED)
            }
            WorkspaceError::Key(_) => (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::KEY_UNAVAILABLE),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::WORKSPACE_FAILED),
        };
        let error = Self::new(status, code, e.to_string());
        if status == StatusCode::SERVICE_UNAVAILABLE { error.retry_after(5) } else { error }
    }
}

impl From<NetworkChangeError> for ApiError {
    fn from(e: NetworkChangeError) -> Self {
        match e {
            NetworkChangeError::Sandbox(e) => e.into(),
            NetworkChangeError::Network(e) => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                ErrorCode::NETWORK_FAILED,
                e.to_string(),
            ),
        }
    }
}

impl From<NoRoom> for ApiError {
    fn from(e: NoRoom) -> Self {
        Self::new(StatusCode::INSUFFICIENT_STORAGE, ErrorCode::DISK_BUDGET_EXCEEDED, e.to_string())
    }
}

impl From<BuildRequestError> for ApiError {
    fn from(e: BuildRequestError) -> Self {
        match e {
            BuildRequestError::Invalid(message) => Self::invalid(message),
            e @ BuildRequestError::Exists(_) => {
                Self::new(StatusCode::CONFLICT, ErrorCode::TEMPLATE_EXISTS, e.to_string())
            }
            BuildRequestError::NoRoom(e) => e.into(),
            BuildRequestError::Db(e) => e.into(),
        }
    }
}

impl From<DeleteError> for ApiError {
    fn from(e: DeleteError) -> Self {
        match e {
            DeleteError::NotFound(name) => Self::template_not_found(&name),
            e @ DeleteError::InUse { .. } => {
                Self::new(StatusCode::CONFLICT, ErrorCode::TEMPLATE_IN_USE, e.to_string())
            }
            e @ DeleteError::Busy(_) => {
                let status = StatusCode::SERVICE_UNAVAILABLE;
                Self::new(status, ErrorCode::TEMPLATE_BUSY, e.to_string()).retry_after(5)
            }
            DeleteError::Db(e) => e.into(),
        }
    }
}

impl From<InputError> for ApiError {
    fn from(e: InputError) -> Self {
        let message = e.to_string();
        match e {
            InputError::Digest { .. } => Self::invalid(format!("body: {message}")),
            InputError::NoRoom(_) => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                ErrorCode::DISK_BUDGET_EXCEEDED,
                message,
            ),
            InputError::Body(_) => Self::malformed(message),
            InputError::File(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::INPUT_NOT_KEPT, message)
            }
        }
    }
}

impl From<GcError> for ApiError {
    fn from(e: GcError) -> Self {
        let message = e.to_string();
        match e {
            GcError::NotReady => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, ErrorCode::TEMPLATE_NOT_READY, message)
                    .retry_after(5)
            }
            GcError::File(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::GC_FAILED, message)
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
                Self::new(status, ErrorCode::of_agent(&error_code), message)
            }
            AgentError::Timeout { .. } => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, ErrorCode::GUEST_TIMEOUT, e.to_string())
            }
            other => {
                Self::new(StatusCode::BAD_GATEWAY, ErrorCode::GUEST_UNREACHABLE, other.to_string())
            }
        }
    }
}
