//! Sandboxes as E2B's API shows them.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, header};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::e2b::ENVD_VERSION;
use crate::engine::SandboxError;
use crate::engine::sandbox::{OnTimeout, Sandbox, State as SandboxState};
use crate::http::App;
use crate::http::error::ApiError;

/// Name of the one host behind this API.
const CLIENT: &str = "rethaw";

/// Where the client found this service: what host names of ports end in.
#[derive(Debug, Clone)]
pub struct Place(Option<String>);

impl Place {
    /// From the `Host` header. Names below an IP address do not exist; below `localhost` they do,
    /// and lead to this machine.
    pub fn of(headers: &HeaderMap) -> Self {
        let host = headers.get(header::HOST).and_then(|v| v.to_str().ok());
        Self(host.and_then(domain))
    }
}

fn domain(host: &str) -> Option<String> {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => (name, Some(port)),
        _ => (host, None),
    };
    let name = match name.trim_matches(['[', ']']).parse::<std::net::IpAddr>() {
        Ok(ip) if ip.is_loopback() => "localhost",
        Ok(_) => return None,
        Err(_) => name,
    };
    Some(port.map_or_else(|| name.to_owned(), |port| format!("{name}:{port}")))
}

/// What the client that made, connected to, or forked a sandbox gets.
pub fn created(sandbox: &Sandbox, access_token: Option<&str>, place: &Place) -> Value {
    let data = sandbox.data();
    json!({
        "templateID": data.template,
        "alias": data.template,
        "sandboxID": data.id,
        "clientID": CLIENT,
        "envdVersion": ENVD_VERSION,
        "envdAccessToken": access_token,
        "trafficAccessToken": null,
        "domain": place.0,
    })
}

/// There are two states on this face: what is on its way to disk or back counts as where it was,
/// and what is on its way out is gone.
pub fn state(sandbox: &Sandbox) -> Option<&'static str> {
    match sandbox.state() {
        SandboxState::Paused | SandboxState::Resuming => Some("paused"),
        SandboxState::Running | SandboxState::Pausing => Some("running"),
        SandboxState::Deleting => None,
    }
}

fn time(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap_or_default()
}

/// One of a list.
pub fn listed(app: &App, sandbox: &Sandbox) -> Value {
    let data = sandbox.data();
    let ready = app.engine.template(&data.template).and_then(|template| template.ready());
    let size = ready.as_ref().map_or(app.engine.config().size, |ready| ready.size);
    let disk = ready.and_then(|ready| std::fs::metadata(&ready.scratch).ok());
    json!({
        "templateID": data.template,
        "alias": data.template,
        "sandboxID": data.id,
        "clientID": CLIENT,
        "startedAt": time(data.created_at),
        "endAt": time(data.expires_at),
        "cpuCount": size.vcpus,
        "memoryMB": size.memory_bytes >> 20,
        "diskSizeMB": disk.map_or(0, |file| file.len() >> 20),
        "state": state(sandbox),
        "metadata": data.metadata,
        "envdVersion": ENVD_VERSION,
    })
}

/// `GET /sandboxes/{id}`
pub async fn get(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    let sandbox = app.engine.sandbox(&id)?;
    if state(&sandbox).is_none() {
        return Err(SandboxError::NotFound(id).into());
    }
    let mut view = listed(&app, &sandbox);
    let on_timeout = match sandbox.data().on_timeout {
        OnTimeout::Kill => "kill",
        OnTimeout::Pause => "pause",
    };
    view["lifecycle"] = json!({ "autoResume": false, "onTimeout": on_timeout });
    view["domain"] = json!(Place::of(&headers).0);
    Ok(Json(view))
}

#[cfg(test)]
mod tests {
    use super::domain;

    #[test]
    fn ports_have_names_below_the_services_own() {
        for (host, wanted) in [
            ("localhost:7070", Some("localhost:7070")),
            ("127.0.0.1:7070", Some("localhost:7070")),
            ("[::1]:7070", Some("localhost:7070")),
            ("box.example.com", Some("box.example.com")),
            ("10.0.0.1:7070", None),
        ] {
            assert_eq!(domain(host).as_deref(), wanted, "{host}");
        }
    }
}
