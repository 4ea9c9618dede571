//! JSON bodies: too long, malformed and invalid are three different answers, each naming the place.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::error::Category;

use super::MAX_JSON_BYTES;
use super::error::{ApiError, ErrorCode};

/// A JSON body, parsed.
#[derive(Debug)]
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, state).await.map_err(|e| too_long(&e))?;
        // An absent body means "all defaults", which the type may refuse.
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        let mut parser = serde_json::Deserializer::from_slice(text);
        let parsed = serde_path_to_error::deserialize(&mut parser).map_err(|e| {
            let place = e.path().to_string();
            match (e.inner().classify(), place.as_str()) {
                (Category::Data, ".") => ApiError::invalid(format!("body: {}", e.inner())),
                (Category::Data, place) => ApiError::invalid(format!("{place}: {}", e.inner())),
                _ => not_json(e.inner()),
            }
        })?;
        parser.end().map_err(|e| not_json(&e))?;
        Ok(Self(parsed))
    }
}

fn not_json(e: &serde_json::Error) -> ApiError {
    ApiError::malformed(format!("the body is not JSON: {e}"))
}

fn too_long(rejection: &BytesRejection) -> ApiError {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        let message = format!("the body is longer than {MAX_JSON_BYTES} bytes");
        return ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, ErrorCode::BODY_TOO_LONG, message);
    }
    ApiError::malformed(rejection.body_text())
}
