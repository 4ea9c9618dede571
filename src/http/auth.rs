//! Who asks: API keys and access tokens, and whether they may.
//!
//! A key comes as `Authorization: Bearer` or `X-API-Key`, an access token as `X-Access-Token` or
//! `Authorization: Bearer`. What a route asks for is in [`super::access`]; a sandbox that a key may
//! not use does not exist for it.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{FromRequestParts, MatchedPath, RawPathParams, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use super::access::{Need, need};
use super::error::ApiError;
use crate::audit::Actor;
use crate::e2b;
use crate::engine::keys::{self, Account, Scope};
use crate::engine::sandbox::Sandbox;
use crate::engine::{SandboxError, ids};

/// What a key that was made here starts with.
pub const KEY_PREFIX: &str = "rtw";

/// Reads the key file, or makes it.
pub fn key_from_file(path: &Path) -> io::Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) if text.trim().len() >= 16 => Ok(text.trim().to_owned()),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the key is shorter than 16 characters; remove the file to have a new one made",
        )),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let key = ids::new_secret(KEY_PREFIX);
            let mut file =
                std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            io::Write::write_all(&mut file, format!("{key}\n").as_bytes())?;
            file.sync_all()?;
            Ok(key)
        }
        Err(e) => Err(e),
    }
}

/// Who asks, for handlers.
#[derive(Debug, Clone)]
pub enum Caller {
    /// The holder of an API key.
    Key(Arc<Account>),
    /// The holder of one sandbox's access token.
    Token,
}

impl Caller {
    /// Id of the key, which owns what is made.
    pub fn owner(&self) -> Option<String> {
        match self {
            Self::Key(account) => Some(account.key.id.clone()),
            Self::Token => None,
        }
    }

    /// Whether a list shows this sandbox.
    pub fn sees(&self, sandbox: &Sandbox) -> bool {
        match self {
            Self::Key(account) => sandbox.with_data(|d| account.key.may_use(d.owner.as_deref())),
            Self::Token => false,
        }
    }

    fn actor(&self) -> Actor {
        match self {
            Self::Key(account) => {
                Actor { kind: "key", name: Some(account.key.name.clone()), id: self.owner() }
            }
            Self::Token => Actor { kind: "token", name: None, id: None },
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::unauthorized)
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|v| v.to_str().ok()).map(str::trim)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    text(headers, header::AUTHORIZATION.as_str()).and_then(|v| v.strip_prefix("Bearer "))
}

/// The key that a request shows.
pub fn presented(headers: &HeaderMap) -> Option<&str> {
    bearer(headers).or_else(|| text(headers, "x-api-key"))
}

/// Whose key this is, also in the form that E2B's older SDKs send.
pub fn account_of(app: &App, shown: &str) -> Option<Arc<Account>> {
    let keys = app.engine.keys();
    keys.find(shown).or_else(|| keys.find(&e2b::native_key(shown)?))
}

/// Lets a request pass that shows a key or token which is good for its route.
pub async fn require_key(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let (mut parts, body) = request.into_parts();
    let route = parts.extensions.get::<MatchedPath>().cloned();
    let route = route.as_ref().map(MatchedPath::as_str).unwrap_or_default();
    let need = need(&parts.method, route);
    let id = sandbox_in_path(&mut parts).await;
    let caller = identify(&app, &parts.headers, need, id.as_deref())?;
    let actor = caller.actor();
    let allowed = allow(&app, &caller, need, id.as_deref());
    parts.extensions.insert(caller);
    let mut response = match allowed {
        Ok(()) => next.run(Request::from_parts(parts, body)).await,
        Err(e) => e.into_response(),
    };
    response.extensions_mut().insert(actor);
    Ok(response)
}

async fn sandbox_in_path(parts: &mut Parts) -> Option<String> {
    let params = RawPathParams::from_request_parts(parts, &()).await.ok()?;
    params.iter().find(|(name, _)| *name == "id").map(|(_, value)| value.to_owned())
}

fn identify(
    app: &App,
    headers: &HeaderMap,
    need: Need,
    id: Option<&str>,
) -> Result<Caller, ApiError> {
    if let Some(everybody) = &app.everybody {
        return Ok(Caller::Key(Arc::clone(everybody)));
    }
    if let Some(account) = presented(headers).and_then(|key| account_of(app, key)) {
        return Ok(Caller::Key(account));
    }
    let token = text(headers, "x-access-token").or_else(|| bearer(headers));
    let opens = |token: &str| {
        let sandbox = app.engine.sandbox(id?).ok()?;
        let digest = hex::encode(keys::digest(token));
        sandbox.with_data(|d| d.token_sha256 == digest).then_some(())
    };
    if need == Need::SandboxOrToken && token.and_then(opens).is_some() {
        return Ok(Caller::Token);
    }
    Err(ApiError::unauthorized())
}

fn allow(app: &App, caller: &Caller, need: Need, id: Option<&str>) -> Result<(), ApiError> {
    let Caller::Key(account) = caller else { return Ok(()) };
    match need {
        Need::AnyKey => Ok(()),
        Need::Scope(scope) if account.key.may(scope) => Ok(()),
        Need::Scope(scope) => Err(ApiError::forbidden(&account.key.name, scope)),
        Need::SomeSandboxes if account.key.may(Scope::AllSandboxes) => Ok(()),
        Need::SomeSandboxes => allow(app, caller, Need::Scope(Scope::Sandboxes), id),
        // Whether there is such a sandbox is for the route to say.
        Need::Sandbox | Need::SandboxOrToken if account.key.may(Scope::AllSandboxes) => Ok(()),
        Need::Sandbox | Need::SandboxOrToken => {
            let id = id.unwrap_or_default();
            let sandbox = app.engine.sandbox(id)?;
            // What a key may not use is not there, as far as it is concerned.
            if caller.sees(&sandbox) {
                return Ok(());
            }
            Err(SandboxError::NotFound(id.to_owned()).into())
        }
    }
}
