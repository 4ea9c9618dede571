//! The data plane: commands and files in a sandbox, for whoever shows the sandbox's token.

mod entry;
mod events;
mod files;
mod filesystem;
mod guest;
mod health;
mod path;
mod process;
mod signature;
mod upload;
mod watch;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

use super::ENVD_PORT;
use crate::http::error::ApiError;
use crate::http::{App, MAX_JSON_BYTES, host};
use guest::HostSandbox;

/// Longest message of a unary call: what is written to a command's input comes in one.
const MAX_UNARY: usize = 8 * MAX_JSON_BYTES;

/// The routes; each looks for the sandbox and its token itself.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/process.Process/List", post(process::list))
        .route("/process.Process/SendInput", post(process::send_input))
        .route("/process.Process/SendSignal", post(process::send_signal))
        .route("/process.Process/CloseStdin", post(process::close_stdin))
        .route("/process.Process/Update", post(process::update))
        .route("/filesystem.Filesystem/Stat", post(filesystem::stat))
        .route("/filesystem.Filesystem/ListDir", post(filesystem::list_dir))
        .route("/filesystem.Filesystem/MakeDir", post(filesystem::make_dir))
        .route("/filesystem.Filesystem/Move", post(filesystem::rename))
        .route("/filesystem.Filesystem/Remove", post(filesystem::remove))
        .route("/filesystem.Filesystem/CreateWatcher", post(watch::create))
        .route("/filesystem.Filesystem/GetWatcherEvents", post(watch::events))
        .route("/filesystem.Filesystem/RemoveWatcher", post(watch::remove))
        .layer(DefaultBodyLimit::max(MAX_UNARY))
        // Streams: each message has a limit of its own, and files only the guest's disk.
        .route("/process.Process/Start", post(process::start))
        .route("/process.Process/Connect", post(process::connect))
        .route("/process.Process/StreamInput", post(process::stream_input))
        .route("/filesystem.Filesystem/WatchDir", post(watch::watch_dir))
        .route(
            "/files",
            get(files::download).post(files::upload).layer(DefaultBodyLimit::disable()),
        )
        .route("/health", get(health::health))
}

fn is_data_path(path: &str) -> bool {
    matches!(path, "/files" | "/health")
        || path.starts_with("/process.Process/")
        || path.starts_with("/filesystem.Filesystem/")
}

/// Notes which sandbox a host name `49983-ID.DOMAIN` is of; nothing but the data plane is served
/// under such a name. A request whose headers name another port of a sandbox gets the host name of
/// that port, which is [`crate::http::ports`]'s business.
pub async fn by_host(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let headers = request.headers();
    let named = headers.get(header::HOST).and_then(|v| v.to_str().ok());
    let named = named.and_then(|name| host::port_and_id(name, None));
    let host = if let Some((ENVD_PORT, id)) = named {
        if !is_data_path(request.uri().path()) {
            return ApiError::route_not_found().into_response();
        }
        let id = HostSandbox(id.to_owned());
        request.extensions_mut().insert(id);
        // Nobody further in is to take the name for that of a port of the guest's own.
        Some("localhost".to_owned())
    } else {
        let text = |name| headers.get(name).and_then(|v| v.to_str().ok());
        let domain = app.domain.as_deref().unwrap_or("localhost");
        match (text("e2b-sandbox-id"), text("e2b-sandbox-port").map(str::parse)) {
            (_, None | Some(Ok(ENVD_PORT))) | (None, _) => None,
            (Some(id), Some(Ok(port))) => Some(format!("{port}-{id}.{domain}")),
            (Some(_), Some(Err(_))) => {
                let message = "E2b-Sandbox-Port: not a port, 1 to 65535";
                return ApiError::malformed(message).into_response();
            }
        }
    };
    if let Some(host) = host.and_then(|host| HeaderValue::try_from(host).ok()) {
        request.headers_mut().insert(header::HOST, host);
    }
    next.run(request).await
}
