//! Ports of sandboxes, for HTTP and WebSocket: `ANY /v1/sandboxes/{id}/ports/{port}/...`, and any
//! path under the host name `{port}-{id}.{domain}`.
//!
//! Who shows a key that may use the sandbox or its token passes, and so does everybody where the port
//! was made public; what was shown is not passed on. A sandbox with a network is connected to over
//! it. Servers that listen on the guest's loopback address only, and sandboxes without a network, are
//! reached through the agent.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{OriginalUri, Path, Request, State};
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::TcpStream;

use super::App;
use super::auth::account_of;
use super::error::{ApiError, ErrorCode};
use super::exec::agent_of;
use super::host::port_and_id;
use crate::e2b::ENVD_PORT;
use crate::engine::sandbox::{Sandbox, SandboxData};

mod tunnel;

/// A guest on this host answers at once or not at all.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Where the token is shown by those that need `Authorization` for the guest's own server.
const TOKEN: HeaderName = HeaderName::from_static("x-access-token");
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// Headers of one connection, not of the message (RFC 9110, 7.6.1).
const HOP_BY_HOP: &[HeaderName] = &[
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// What carries the guest's HTTP.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// `ANY /v1/sandboxes/{id}/ports/{port}/...`
pub async fn by_path(
    State(app): State<App>,
    Path(params): Path<Vec<(String, String)>>,
    OriginalUri(uri): OriginalUri,
    request: Request,
) -> Result<Response, ApiError> {
    let find = |name: &str| params.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
    let (id, port) = (find("id").unwrap_or_default(), find("port").unwrap_or_default());
    let number = port.parse::<u16>().ok().filter(|p| *p != 0 && !port.starts_with('+'));
    let number =
        number.ok_or_else(|| ApiError::invalid(format!("port: {port:?} is not 1 to 65535")))?;
    let prefix = format!("/v1/sandboxes/{id}/ports/{port}");
    // As it came, not as it was decoded.
    let rest = uri.path().strip_prefix(&prefix).unwrap_or("/");
    let rest = if rest.is_empty() { "/" } else { rest };
    let target = match uri.query() {
        Some(query) => format!("{rest}?{query}"),
        None => rest.to_owned(),
    };
    let host = HeaderValue::from_str(&format!("localhost:{number}"));
    let host = host.map_err(|e| ApiError::malformed(e.to_string()))?;
    let way = Way { id: id.to_owned(), port: number, target, host, prefix: Some(prefix) };
    proxy(&app, way, request).await
}

/// Takes requests whose host name is that of a port.
pub async fn by_host(State(app): State<App>, request: Request, next: Next) -> Response {
    let named = request.headers().get(header::HOST).and_then(|h| h.to_str().ok());
    let named =
        named.or_else(|| request.uri().authority().map(hyper::http::uri::Authority::as_str));
    let Some((port, id)) = named.and_then(|host| port_and_id(host, app.domain.as_deref())) else {
        return next.run(request).await;
    };
    // The service itself answers on it: crate::e2b.
    if port == ENVD_PORT {
        return next.run(request).await;
    }
    let host = named.and_then(|host| HeaderValue::from_str(host).ok());
    let target = request.uri().path_and_query().map_or("/", PathAndQuery::as_str).to_owned();
    let host = host.unwrap_or_else(|| HeaderValue::from_static("localhost"));
    let way = Way { id: id.to_owned(), port, target, host, prefix: None };
    proxy(&app, way, request).await.into_response()
}

/// Where a request goes.
struct Way {
    id: String,
    port: u16,
    target: String,
    host: HeaderValue,
    /// What of the path is not the guest's.
    prefix: Option<String>,
}

async fn proxy(app: &App, way: Way, mut request: Request) -> Result<Response, ApiError> {
    let sandbox = app.engine.sandbox(&way.id);
    let data = sandbox.as_ref().ok().map(|sandbox| sandbox.data());
    // Without a right to know, a sandbox that is not there looks like one that is.
    authorize(app, data.as_ref(), way.port, request.headers_mut())?;
    let sandbox = sandbox?;
    let upgrade = upgrade_of(request.headers());
    let outward = request.extensions_mut().remove::<hyper::upgrade::OnUpgrade>();
    let request = rewritten(&way, request, upgrade.as_ref())?;
    let stream = connect(&sandbox, way.port).await?;
    let mut answer = send(stream, request, way.port).await?;
    metrics::counter!("rethaw_port_requests_total").increment(1);
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        strip(answer.headers_mut());
        return Ok(answer.map(Body::new));
    }
    let inward = hyper::upgrade::on(&mut answer);
    let Some(outward) = outward else {
        let message = "the guest switched protocols, and nobody asked it to";
        return Err(ApiError::new(StatusCode::BAD_GATEWAY, ErrorCode::GUEST_UNREACHABLE, message));
    };
    // Lasts as long as both ends want it to; the guest's end closes when its VM goes.
    tokio::spawn(async move {
        if let (Ok(outward), Ok(inward)) = tokio::join!(outward, inward) {
            let (mut outward, mut inward) = (TokioIo::new(outward), TokioIo::new(inward));
            let _ = copy_bidirectional(&mut outward, &mut inward).await;
        }
    });
    Ok(answer.map(|_| Body::empty()))
}

/// Lets pass who may, and takes out of the headers what was shown to us and not to the guest.
fn authorize(
    app: &App,
    data: Option<&SandboxData>,
    port: u16,
    headers: &mut HeaderMap,
) -> Result<(), ApiError> {
    let is_ours = |shown: &str| {
        let digest = hex::encode(Sha256::digest(shown.as_bytes()));
        data.is_some_and(|data| data.token_sha256 == digest)
            || account_of(app, shown)
                .is_some_and(|a| data.is_none_or(|d| a.key.may_use(d.owner.as_deref())))
    };
    let mut shown = false;
    for name in [TOKEN, API_KEY, header::AUTHORIZATION] {
        let value = headers.get(&name).and_then(|v| v.to_str().ok());
        let value = value.map(|v| v.strip_prefix("Bearer ").unwrap_or(v).trim());
        if value.is_some_and(is_ours) {
            headers.remove(&name);
            shown = true;
        }
    }
    let public = data.is_some_and(|data| data.network.public_ports.contains(&port));
    if shown || public || app.everybody.is_some() {
        return Ok(());
    }
    let message = format!(
        "port {port} of this sandbox is not public: send the sandbox's access token as \
         \"X-Access-Token: TOKEN\" or \"Authorization: Bearer TOKEN\""
    );
    Err(ApiError::new(StatusCode::UNAUTHORIZED, ErrorCode::UNAUTHORIZED, message))
}

/// The protocol that the client wants to go over to.
fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let connection = headers.get_all(header::CONNECTION).iter().filter_map(|v| v.to_str().ok());
    let wanted = connection
        .flat_map(|v| v.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("upgrade"));
    headers.get(header::UPGRADE).filter(|_| wanted).cloned()
}

/// Takes out what is of one connection only.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// The request as the guest's server sees it.
fn rewritten(
    way: &Way,
    request: Request,
    upgrade: Option<&HeaderValue>,
) -> Result<Request, ApiError> {
    let (mut head, body) = request.into_parts();
    head.uri = way.target.parse::<Uri>().map_err(|e| ApiError::malformed(e.to_string()))?;
    head.version = axum::http::Version::HTTP_11;
    strip(&mut head.headers);
    if let Some(upgrade) = upgrade {
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers.insert(header::UPGRADE, upgrade.clone());
    }
    let asked = head.headers.insert(header::HOST, way.host.clone());
    if let (Some(prefix), Some(asked)) = (&way.prefix, asked) {
        head.headers.insert("x-forwarded-host", asked);
        if let Ok(prefix) = HeaderValue::from_str(prefix) {
            head.headers.insert("x-forwarded-prefix", prefix);
        }
    }
    Ok(Request::from_parts(head, body))
}

async fn connect(sandbox: &Arc<Sandbox>, port: u16) -> Result<Box<dyn Stream>, ApiError> {
    // Also says in which state it is, if it does not run.
    let agent = agent_of(sandbox, "ports")?;
    if let Some(addresses) = sandbox.data().addresses {
        let direct = TcpStream::connect(SocketAddr::new(addresses.ipv4.into(), port));
        if let Ok(Ok(stream)) = tokio::time::timeout(CONNECT_DEADLINE, direct).await {
            let _ = stream.set_nodelay(true);
            return Ok(Box::new(stream));
        }
    }
    Ok(Box::new(tunnel::open(&agent, port).await?))
}

async fn send(
    stream: Box<dyn Stream>,
    request: Request,
    port: u16,
) -> Result<axum::http::Response<hyper::body::Incoming>, ApiError> {
    let failed = |e: hyper::Error| {
        let message = format!("port {port} of the guest does not speak HTTP: {e}");
        ApiError::new(StatusCode::BAD_GATEWAY, ErrorCode::PORT_FAILED, message)
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // Ends with the answer's body, or with whatever the connection becomes.
    tokio::spawn(async move {
        let _ = connection.with_upgrades().await;
    });
    sender.send_request(request).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        list.iter()
            .map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v)))
            .collect()
    }

    #[test]
    fn what_is_of_one_connection_does_not_pass() {
        let mut map = headers(&[
            ("connection", "keep-alive, x-mine"),
            ("x-mine", "1"),
            ("transfer-encoding", "chunked"),
            ("accept", "*/*"),
        ]);
        strip(&mut map);
        assert_eq!(map.len(), 1);
        assert!(map.contains_key("accept"));
    }

    #[test]
    fn an_upgrade_needs_both_headers() {
        let both = headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert_eq!(upgrade_of(&both).unwrap(), "websocket");
        assert!(upgrade_of(&headers(&[("upgrade", "websocket")])).is_none());
        assert!(upgrade_of(&headers(&[("connection", "upgrade")])).is_none());
    }
}
