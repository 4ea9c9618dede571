//! Answers: JSON, nothing, or an error with its code.

use super::Body;
use crate::wire::{ErrorBody, codes};
use hyper::http::header::CONTENT_TYPE;
use hyper::http::{HeaderValue, Response, StatusCode};
use serde::Serialize;
use std::io;

/// What every endpoint returns.
pub type Answer = Result<Response<Body>, ApiError>;

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{status} {error_code}: {message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// One of [`codes`].
    pub error_code: &'static str,
    /// For people.
    pub message: String,
}

impl ApiError {
    /// A refusal with this status and code.
    pub fn new(status: u16, error_code: &'static str, message: impl Into<String>) -> Self {
        Self { status, error_code, message: message.into() }
    }

    /// The agent could not do what it should have been able to do.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, codes::INTERNAL, message)
    }

    /// A body that cannot be understood.
    pub fn invalid_json(error: &serde_json::Error) -> Self {
        Self::new(400, codes::INVALID_REQUEST, format!("the body: {error}"))
    }

    /// What an I/O error on `path` means to the caller.
    pub fn from_io(error: &io::Error, path: &str) -> Self {
        use io::ErrorKind as K;
        let (status, code) = match error.kind() {
            K::NotFound => (404, codes::FILE_NOT_FOUND),
            K::PermissionDenied | K::ReadOnlyFilesystem => (403, codes::PERMISSION_DENIED),
            K::AlreadyExists | K::DirectoryNotEmpty => (409, codes::ALREADY_EXISTS),
            K::IsADirectory => (409, codes::IS_A_DIRECTORY),
            K::NotADirectory => (409, codes::NOT_A_DIRECTORY),
            K::StorageFull | K::QuotaExceeded | K::FileTooLarge => (507, codes::DISK_FULL),
            K::InvalidFilename => (400, codes::INVALID_PATH),
            _ => (500, codes::INTERNAL),
        };
        Self::new(status, code, format!("{path}: {error}"))
    }

    /// The body of the answer that carries this refusal.
    pub fn into_body(self) -> Vec<u8> {
        let body = ErrorBody { error_code: self.error_code.to_owned(), message: self.message };
        serde_json::to_vec(&body).unwrap_or_default()
    }

    /// The answer that carries this refusal.
    pub fn into_response(self) -> Response<Body> {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = Response::new(Body::Full(Some(self.into_body().into())));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}

/// 200 with a JSON body.
///
/// # Errors
/// The value cannot be written as JSON.
pub fn json<T: Serialize>(value: &T) -> Answer {
    let bytes = serde_json::to_vec(value).map_err(|e| ApiError::internal(e.to_string()))?;
    let mut response = Response::new(Body::Full(Some(bytes.into())));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// 204.
///
/// # Errors
/// None; the type is that of every endpoint.
pub fn no_content() -> Answer {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}
