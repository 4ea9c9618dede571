//! `Idempotency-Key`: a request that was sent again, because its reply was lost, is answered with
//! that reply instead of being done a second time.
//!
//! ```text
//! key unknown --claimed--> done --2xx--> reply kept for 24 h --same request--> replayed
//!                           |                      +--other request--> 422
//!                           +--anything else--> key free again
//! ```
//!
//! A key belongs to the API key it came with. While its request is under way it is 409. A service
//! that was killed meanwhile gives it back when it starts again, after it has removed whatever the
//! request had made. Replies hold access tokens, so they are stored encrypted, under a key that is
//! derived from the API key and the idempotency key: what is in the database alone opens nothing.

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::Instrument;
use uffd_handler::seal::Key;

use super::error::{ApiError, ErrorCode};
use super::{App, MAX_JSON_BYTES, auth, request_id};
use crate::engine::db::{Db, Known};

const HEADER: HeaderName = HeaderName::from_static("idempotency-key");
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
const MAX_KEY: usize = 255;
/// A reply is never larger: a fork of a hundred clones has about half of it.
const MAX_REPLY: usize = 4 << 20;
const PURPOSE: &str = "stored reply";
/// Headers of a reply that are replayed.
const KEPT: &[&str] = &["content-type", "location", "server-timing"];

tokio::task_local! {
    static CURRENT: String;
}

/// Names the request that this task serves, if it came with an idempotency key.
pub fn current() -> Option<String> {
    CURRENT.try_with(Clone::clone).ok()
}

/// A reply as it is stored.
#[derive(Serialize, Deserialize)]
struct Kept {
    headers: Vec<(String, String)>,
    body: String,
}

/// Does each request with a key once.
pub async fn once(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let Some(key) = key_of(request.headers())? else { return Ok(next.run(request).await) };
    if request.method() != Method::POST {
        let message = "Idempotency-Key: only for POST; GET, PUT and DELETE can be sent again as \
                       they are";
        return Err(ApiError::invalid(message));
    }
    if request.uri().path().ends_with("/exec") {
        let message = "Idempotency-Key: a command's output is a stream and not kept; send exec \
                       without it";
        return Err(ApiError::invalid(message));
    }
    let secret = secret_of(request.headers(), &key);
    let name = hex::encode(Sha256::digest([b"name ", secret.expose().as_slice()].concat()));
    let (head, body) = request.into_parts();
    let body = to_bytes(body, MAX_JSON_BYTES).await.map_err(|_| {
        let message = format!("the body is longer than {MAX_JSON_BYTES} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, ErrorCode::BODY_TOO_LONG, message)
    })?;
    let digest = Sha256::new()
        .chain_update(head.uri.to_string().as_bytes())
        .chain_update(b"\n")
        .chain_update(&body)
        .finalize();
    let digest = hex::encode(digest);
    let db = app.engine.db();
    match db.idempotency_claim(&name, &digest).await? {
        Known::New => {}
        Known::Done { status, reply } => return replay(&secret, status, &reply),
        Known::Other => {
            let message = format!("Idempotency-Key: {key:?} was used for another request");
            return Err(ApiError::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                ErrorCode::IDEMPOTENCY_KEY_REUSED,
                message,
            ));
        }
        Known::UnderWay => {
            let message = format!("Idempotency-Key: the request with {key:?} is still under way");
            let e = ApiError::new(StatusCode::CONFLICT, ErrorCode::REQUEST_UNDER_WAY, message);
            return Err(e.retry_after(1));
        }
    }
    let request = Request::from_parts(head, Body::from(body));
    let (db, claimed) = (db.clone(), name.clone());
    // On a task of its own: the work goes on when the client has gone away, and its reply is kept
    // for when it comes again.
    let work = request_id::carried(CURRENT.scope(name, async move {
        let response = next.run(request).await;
        keep(&db, &secret, &claimed, response).await
    }));
    match tokio::spawn(work.in_current_span()).await {
        Ok(response) => Ok(response?),
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

/// The key, as a bare word or quoted as a structured header has it.
fn key_of(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get(HEADER) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    let bare = text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text);
    let fits = (1..=MAX_KEY).contains(&bare.len())
        && bare.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
    if !fits {
        let message =
            format!("Idempotency-Key: not 1 to {MAX_KEY} printable characters without spaces");
        return Err(ApiError::invalid(message));
    }
    Ok(Some(bare.to_owned()))
}

/// What only those have who send the request again.
fn secret_of(headers: &HeaderMap, key: &str) -> Key {
    let who = auth::presented(headers).unwrap_or_default();
    let digest = Sha256::new()
        .chain_update((who.len() as u64).to_le_bytes())
        .chain_update(who.as_bytes())
        .chain_update(key.as_bytes())
        .finalize();
    Key::from_bytes(digest.into())
}

/// Stores a reply that says that something was done; anything else frees the key.
async fn keep(db: &Db, secret: &Key, name: &str, response: Response) -> Result<Response, ApiError> {
    if !response.status().is_success() {
        db.idempotency_release(name).await?;
        return Ok(response);
    }
    let (head, body) = response.into_parts();
    let body = to_bytes(body, MAX_REPLY).await.map_err(|e| unkept(&e))?;
    let text = |name: &&str| {
        let value = head.headers.get(*name)?.to_str().ok()?;
        Some(((*name).to_owned(), value.to_owned()))
    };
    let kept = Kept {
        headers: KEPT.iter().filter_map(text).collect(),
        body: String::from_utf8_lossy(&body).into_owned(),
    };
    let plain = serde_json::to_vec(&kept).map_err(|e| unkept(&e))?;
    let sealed = secret.seal(PURPOSE, &plain).map_err(|e| unkept(&e))?;
    // Before the client hears of it: from here on it can be asked again.
    db.idempotency_done(name, head.status.as_u16(), STANDARD.encode(sealed)).await?;
    Ok(Response::from_parts(head, Body::from(body)))
}

fn unkept(e: &dyn std::fmt::Display) -> ApiError {
    let message = format!("the request was done, its reply could not be kept: {e}");
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::STATE_STORE_FAILED, message)
}

fn replay(secret: &Key, status: u16, stored: &str) -> Result<Response, ApiError> {
    let kept = || {
        let sealed = STANDARD.decode(stored).ok()?;
        let plain = secret.open(PURPOSE, &sealed).ok()?;
        serde_json::from_slice::<Kept>(&plain).ok()
    };
    let kept = kept().ok_or_else(|| unkept(&"what is stored does not open"))?;
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
    let mut response = (status, Bytes::from(kept.body)).into_response();
    for (name, value) in kept.headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            response.headers_mut().insert(name, value);
        }
    }
    response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn keys_come_bare_or_quoted() {
        let key = |text: &str| key_of(&headers(&[("idempotency-key", text)]));
        assert_eq!(key("key-1").unwrap().as_deref(), Some("key-1"));
        assert_eq!(key("\"key-1\"").unwrap().as_deref(), Some("key-1"));
        assert_eq!(key(&"x".repeat(255)).unwrap().map(|k| k.len()), Some(255));
        let long = "x".repeat(256);
        for wrong in ["", "\"\"", "a b", "a\"b", &long] {
            assert!(key(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(key_of(&headers(&[])).unwrap(), None);
    }

    #[test]
    fn a_key_is_its_api_keys_own() {
        let of = |who: &[(&'static str, &str)], key| *secret_of(&headers(who), key).expose();
        let one = of(&[("x-api-key", "one")], "k");
        assert_eq!(one, of(&[("authorization", "Bearer one")], "k"));
        assert_ne!(one, of(&[("x-api-key", "two")], "k"));
        assert_ne!(one, of(&[("x-api-key", "one")], "l"));
        assert_ne!(of(&[("x-api-key", "a")], "bc"), of(&[("x-api-key", "ab")], "c"));
    }

    #[test]
    fn what_is_stored_opens_for_the_same_asker_only() {
        let secret = secret_of(&headers(&[("x-api-key", "one")]), "k");
        let other = secret_of(&headers(&[("x-api-key", "two")]), "k");
        let kept = Kept { headers: Vec::new(), body: "{}".to_owned() };
        let sealed = secret.seal(PURPOSE, &serde_json::to_vec(&kept).unwrap()).unwrap();
        let stored = STANDARD.encode(sealed);
        let again = replay(&secret, 201, &stored).unwrap();
        assert_eq!(again.status(), StatusCode::CREATED);
        assert_eq!(again.headers()[REPLAYED], "true");
        assert!(replay(&other, 201, &stored).is_err());
    }
}
