//! Connect's error codes, and what the service's and the guest's errors are among them.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use guest_agent::client::AgentError;
use guest_agent::wire::codes;
use serde::Serialize;

use crate::http::error::ApiError;

/// The codes in use here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request is wrong in itself.
    InvalidArgument,
    /// Time is up.
    DeadlineExceeded,
    /// No such thing.
    NotFound,
    /// It is there already.
    AlreadyExists,
    /// Known, and not allowed to.
    PermissionDenied,
    /// Too many, or no room.
    ResourceExhausted,
    /// Right in itself, wrong now.
    FailedPrecondition,
    /// Not spoken here.
    Unimplemented,
    /// It broke.
    Internal,
    /// The guest cannot be reached.
    Unavailable,
    /// Something was lost for good.
    DataLoss,
    /// Not known.
    Unauthenticated,
}

impl Code {
    /// Status of a unary call that ends so.
    fn status(self) -> StatusCode {
        match self {
            Self::InvalidArgument | Self::FailedPrecondition => StatusCode::BAD_REQUEST,
            Self::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::AlreadyExists => StatusCode::CONFLICT,
            Self::PermissionDenied => StatusCode::FORBIDDEN,
            Self::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            Self::Unimplemented => StatusCode::NOT_IMPLEMENTED,
            Self::Internal | Self::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
        }
    }

    /// Of an error of the native API or of the agent.
    fn of(status: StatusCode, error_code: &str) -> Self {
        match error_code {
            codes::FILE_NOT_FOUND | codes::PROCESS_NOT_FOUND | codes::WATCHER_NOT_FOUND => {
                Self::NotFound
            }
            codes::ALREADY_EXISTS => Self::AlreadyExists,
            codes::IS_A_DIRECTORY | codes::NOT_A_DIRECTORY | codes::NOT_A_FILE => {
                Self::InvalidArgument
            }
            codes::USER_NOT_FOUND => Self::Unauthenticated,
            _ => match status.as_u16() {
                400 | 413 | 422 => Self::InvalidArgument,
                401 => Self::Unauthenticated,
                403 => Self::PermissionDenied,
                404 => Self::NotFound,
                409 => Self::FailedPrecondition,
                429 | 507 => Self::ResourceExhausted,
                502 | 503 => Self::Unavailable,
                504 => Self::DeadlineExceeded,
                _ => Self::Internal,
            },
        }
    }
}

/// How a call failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    code: Code,
    message: String,
}

impl RpcError {
    /// An error with its code and text.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// What kind it is.
    #[cfg(test)]
    pub fn code(&self) -> Code {
        self.code
    }
}

impl IntoResponse for RpcError {
    fn into_response(self) -> Response {
        (self.code.status(), Json(self)).into_response()
    }
}

impl From<ApiError> for RpcError {
    fn from(e: ApiError) -> Self {
        Self::new(Code::of(e.status(), e.error_code()), e.message())
    }
}

impl From<AgentError> for RpcError {
    fn from(e: AgentError) -> Self {
        ApiError::from(e).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_errors_have_codes_that_sdks_tell_apart() {
        let of = |status, code| Code::of(StatusCode::from_u16(status).unwrap_or_default(), code);
        assert_eq!(of(404, codes::FILE_NOT_FOUND), Code::NotFound);
        assert_eq!(of(409, codes::ALREADY_EXISTS), Code::AlreadyExists);
        assert_eq!(of(409, codes::WRONG_STATE), Code::FailedPrecondition);
        assert_eq!(of(409, codes::IS_A_DIRECTORY), Code::InvalidArgument);
        assert_eq!(of(422, codes::USER_NOT_FOUND), Code::Unauthenticated);
        assert_eq!(of(422, codes::CWD_NOT_FOUND), Code::InvalidArgument);
        assert_eq!(of(507, codes::DISK_FULL), Code::ResourceExhausted);
        let error = RpcError::new(Code::NotFound, "gone");
        let json = serde_json::to_string(&error).unwrap_or_default();
        assert_eq!(json, r#"{"code":"not_found","message":"gone"}"#);
    }
}
