//! Which sandbox a request is for, and whether it may ask.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use guest_agent::client::AgentClient;
use guest_agent::wire::codes;
use sha2::{Digest, Sha256};

use crate::e2b::DEFAULT_USER;
use crate::e2b::rpc::RpcError;
use crate::engine::sandbox::Sandbox;
use crate::http::App;
use crate::http::error::{ApiError, ErrorCode};

/// The sandbox that the request's host name is of.
#[derive(Debug, Clone)]
pub struct HostSandbox(pub String);

/// A refusal in the form the SDKs read on the data plane: plain JSON, and not worth another try.
#[derive(Debug)]
pub struct Refusal(ApiError);

impl<E: Into<ApiError>> From<E> for Refusal {
    fn from(e: E) -> Self {
        let e = e.into();
        // Statuses that the SDKs have exceptions of their own for.
        let status = match e.error_code() {
            codes::IS_A_DIRECTORY | codes::NOT_A_DIRECTORY | codes::NOT_A_FILE => {
                StatusCode::BAD_REQUEST
            }
            codes::USER_NOT_FOUND => StatusCode::UNAUTHORIZED,
            _ => return Self(e),
        };
        Self(e.with_status(status))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = self.0.into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert("should-retry", HeaderValue::from_static("false"));
        response
    }
}

impl From<Refusal> for RpcError {
    fn from(e: Refusal) -> Self {
        e.0.into()
    }
}

/// Id of the sandbox the request is for, if it says so.
pub fn sandbox_id(parts: &Parts) -> Option<&str> {
    let by_host = parts.extensions.get::<HostSandbox>().map(|host| host.0.as_str());
    by_host.or_else(|| parts.headers.get("e2b-sandbox-id").and_then(|v| v.to_str().ok()))
}

/// A running sandbox. The SDKs look for "was not found" in the message.
pub fn running(app: &App, id: &str) -> Result<Guest, Refusal> {
    let gone = |why: &str| {
        let message = format!("sandbox {id} was not found: {why}");
        Refusal(ApiError::new(StatusCode::BAD_GATEWAY, ErrorCode::SANDBOX_NOT_RUNNING, message))
    };
    let sandbox = app.engine.sandbox(id).map_err(|_| gone("there is none with this id"))?;
    let state = sandbox.state().as_str();
    let agent = sandbox.agent().ok_or_else(|| gone(&format!("it is {state}")))?;
    Ok(Guest { sandbox, agent, user: DEFAULT_USER.to_owned() })
}

/// Whether the request shows the sandbox's token.
pub fn shows_token(headers: &HeaderMap, sandbox: &Sandbox) -> bool {
    let shown = headers.get("x-access-token").map(HeaderValue::as_bytes).unwrap_or_default();
    // Digests, so that the time the comparison takes says nothing about the token.
    hex::encode(Sha256::digest(shown)) == sandbox.data().token_sha256
}

/// No or wrong token.
pub fn wrong_token() -> Refusal {
    let message = "missing or wrong access token: send the envdAccessToken of the sandbox as \
                   \"X-Access-Token: TOKEN\"";
    Refusal(ApiError::new(StatusCode::UNAUTHORIZED, ErrorCode::UNAUTHORIZED, message))
}

/// A running sandbox whose token was shown.
#[derive(Debug)]
pub struct Guest {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// Its agent.
    pub agent: AgentClient,
    /// User to act as.
    pub user: String,
}

impl FromRequestParts<App> for Guest {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let id = sandbox_id(parts).ok_or_else(|| {
            let message = "which sandbox? name it in the E2b-Sandbox-Id header";
            Refusal(ApiError::malformed(message))
        })?;
        let mut guest = running(app, id)?;
        if !shows_token(&parts.headers, &guest.sandbox) {
            return Err(wrong_token());
        }
        if let Some(user) = user(&parts.headers) {
            guest.user = user;
        }
        Ok(guest)
    }
}

/// The user in `Authorization: Basic base64(USER:)`; it proves nothing, it is a wish.
fn user(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let text = String::from_utf8(STANDARD.decode(value.strip_prefix("Basic ")?).ok()?).ok()?;
    let name = text.split_once(':').map_or(text.as_str(), |(name, _)| name);
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_is_a_basic_name_without_a_password() {
        let of = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().ok()?);
            user(&headers)
        };
        assert_eq!(of(&format!("Basic {}", STANDARD.encode("root:"))).as_deref(), Some("root"));
        assert_eq!(of(&format!("Basic {}", STANDARD.encode("root"))).as_deref(), Some("root"));
        assert_eq!(of(&format!("Basic {}", STANDARD.encode(":"))), None);
        assert_eq!(of("Basic !"), None);
        assert_eq!(of("Bearer abc"), None);
    }
}
