//! API keys: made on the first start, kept in a file only its owner can read, compared by digest.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};

use super::App;
use super::error::ApiError;
use crate::e2b;
use crate::engine::ids;

/// What a key that was made here starts with.
pub const KEY_PREFIX: &str = "rtw";

/// A key's digest; the key itself is not kept.
#[derive(Clone)]
pub struct ApiKey([u8; 32]);

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

impl ApiKey {
    /// Reads the key file, or makes it.
    pub fn from_file(path: &Path) -> io::Result<Self> {
        match std::fs::read_to_string(path) {
            Ok(text) if text.trim().len() >= 16 => Ok(Self::of(text.trim())),
            Ok(_) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the key is shorter than 16 characters; remove the file to have a new one made",
            )),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let key = ids::new_secret(KEY_PREFIX);
                let mut file = std::fs::OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(path)?;
                io::Write::write_all(&mut file, format!("{key}\n").as_bytes())?;
                file.sync_all()?;
                Ok(Self::of(&key))
            }
            Err(e) => Err(e),
        }
    }

    fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// Whether this is the key.
    pub fn matches(&self, presented: &str) -> bool {
        // Digests, so that the time the comparison takes says nothing about the key.
        Self::of(presented).0 == self.0
    }
}

/// The key that a request shows.
pub fn presented(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers
        .get(header::AUTHORIZATION)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("Bearer "));
    bearer.or_else(|| headers.get("x-api-key").and_then(|v| v.to_str().ok())).map(str::trim)
}

/// Lets a request pass that shows the key.
pub async fn require_key(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if let Some(key) = &app.key
        && !presented(request.headers())
            .is_some_and(|p| key.matches(p) || e2b::native_key(p).is_some_and(|p| key.matches(&p)))
    {
        return Err(ApiError::unauthorized());
    }
    Ok(next.run(request).await)
}
