//! Where the service listens: TCP, with TLS if there is a certificate, and a Unix socket.

use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::server::TlsStream;

/// Longest TLS handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// TLS handshakes at a time; more wait to be accepted.
const MAX_HANDSHAKES: usize = 256;

/// Where a request came from.
#[derive(Debug, Clone)]
pub struct Peer(pub String);

impl Connected<IncomingStream<'_, TcpListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        Self(stream.remote_addr().to_string())
    }
}

impl Connected<IncomingStream<'_, TlsListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, TlsListener>) -> Self {
        Self(stream.remote_addr().to_string())
    }
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let credentials = stream.io().peer_cred();
        Self(credentials.map_or_else(|_| "unix".to_owned(), |c| format!("unix:uid={}", c.uid())))
    }
}

/// Files of a certificate and its key, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those that vouch for it.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Why the service cannot listen as it was told to.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address cannot be had.
    #[error("cannot listen on {place}: {source}")]
    Bind {
        /// Address or path.
        place: String,
        /// Why.
        source: io::Error,
    },
    /// A file that is no PEM, or none at all.
    #[error("TLS file {}: {reason}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Certificate and key do not go together.
    #[error("TLS certificate {}: {source}", path.display())]
    Certificate {
        /// The certificate.
        path: PathBuf,
        /// Why.
        source: tokio_rustls::rustls::Error,
    },
}

/// Everything the service listens on, bound.
#[derive(Debug)]
pub struct Listeners {
    tcp: Vec<TcpListener>,
    unix: Option<(UnixListener, PathBuf)>,
    tls: Option<Tls>,
}

impl Listeners {
    /// Binds all of it.
    pub async fn bind(
        tcp: &[SocketAddr],
        unix: Option<&Path>,
        tls: Option<TlsFiles>,
    ) -> Result<Self, ListenError> {
        let tls = tls.map(Tls::load).transpose()?;
        let mut listeners = Self { tcp: Vec::new(), unix: None, tls };
        for address in tcp {
            let bound = TcpListener::bind(address).await.map_err(failed(address))?;
            listeners.tcp.push(bound);
        }
        if let Some(path) = unix {
            let bound = bind_unix(path).await.map_err(failed(path.display()))?;
            listeners.unix = Some((bound, path.to_owned()));
        }
        Ok(listeners)
    }

    /// Serves on all of it until `stop` says so, then until open requests are answered.
    pub async fn serve(self, router: Router, stop: watch::Receiver<bool>) {
        let mut servers = JoinSet::new();
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        for tcp in self.tcp {
            if let Ok(address) = tcp.local_addr() {
                tracing::info!("listening on {scheme}://{address}");
            }
            match &self.tls {
                Some(tls) => {
                    let listener =
                        TlsListener { tcp, tls: tls.clone(), handshakes: JoinSet::new() };
                    let app = router.clone().into_make_service_with_connect_info::<Peer>();
                    let server = axum::serve(listener, app);
                    servers.spawn(server.with_graceful_shutdown(told(stop.clone())).into_future());
                }
                None => {
                    let app = router.clone().into_make_service_with_connect_info::<Peer>();
                    let server = axum::serve(tcp, app);
                    servers.spawn(server.with_graceful_shutdown(told(stop.clone())).into_future());
                }
            }
        }
        if let Some((listener, path)) = self.unix {
            tracing::info!("listening on unix:{}", path.display());
            let app = router.into_make_service_with_connect_info::<Peer>();
            let server = axum::serve(listener, app);
            servers.spawn(server.with_graceful_shutdown(told(stop)).into_future());
        }
        tokio::select! {
            () = all(servers) => {}
            () = reload_on_hangup(self.tls) => {}
        }
    }
}

fn failed(place: impl std::fmt::Display) -> impl FnOnce(io::Error) -> ListenError {
    move |source| ListenError::Bind { place: place.to_string(), source }
}

async fn told(mut stop: watch::Receiver<bool>) {
    // An error means that whoever could say so is gone, which says the same.
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn all(mut servers: JoinSet<io::Result<()>>) {
    while servers.join_next().await.is_some() {}
}

/// Binds a socket that its owner and group may use, in the place of one that nobody listens on.
async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if path.exists() && UnixStream::connect(path).await.is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// A certificate that can be renewed without a restart.
#[derive(Clone)]
struct Tls {
    files: TlsFiles,
    acceptor: Arc<RwLock<TlsAcceptor>>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.files.fmt(f)
    }
}

impl Tls {
    fn load(files: TlsFiles) -> Result<Self, ListenError> {
        let acceptor = Arc::new(RwLock::new(acceptor(&files)?));
        Ok(Self { files, acceptor })
    }

    fn acceptor(&self) -> TlsAcceptor {
        self.acceptor.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the files again; what cannot be used is reported and changes nothing.
    fn reload(&self) {
        match acceptor(&self.files) {
            Ok(new) => {
                *self.acceptor.write().unwrap_or_else(PoisonError::into_inner) = new;
                tracing::info!("SIGHUP: TLS certificate read again");
            }
            Err(e) => tracing::error!("SIGHUP: {e}; the old certificate stays in use"),
        }
    }
}

/// Reads the certificate again on each SIGHUP, if there is one. At a terminal without TLS the signal
/// keeps its meaning: the terminal is gone.
async fn reload_on_hangup(tls: Option<Tls>) {
    if tls.is_none() && io::stderr().is_terminal() {
        return std::future::pending().await;
    }
    let Ok(mut hangup) = signal(SignalKind::hangup()) else {
        return std::future::pending().await;
    };
    while hangup.recv().await.is_some() {
        match &tls {
            Some(tls) => tls.reload(),
            None => tracing::info!("SIGHUP: there is no TLS certificate to read again"),
        }
    }
}

fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, ListenError> {
    let pem = |path: &Path, reason: String| ListenError::Pem { path: path.to_owned(), reason };
    let chain = CertificateDer::pem_file_iter(&files.cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| pem(&files.cert, e.to_string()))?;
    if chain.is_empty() {
        return Err(pem(&files.cert, "no certificate in it".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key);
    let key = key.map_err(|e| pem(&files.key, e.to_string()))?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key));
    let mut config =
        config.map_err(|source| ListenError::Certificate { path: files.cert.clone(), source })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Hands out connections whose handshake is done; a slow one holds up nobody else.
#[derive(Debug)]
struct TlsListener {
    tcp: TcpListener,
    tls: Tls,
    handshakes: JoinSet<Option<(TlsStream<TcpStream>, SocketAddr)>>,
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let room = self.handshakes.len() < MAX_HANDSHAKES;
            tokio::select! {
                (stream, peer) = Listener::accept(&mut self.tcp), if room => {
                    let acceptor = self.tls.acceptor();
                    self.handshakes.spawn(async move {
                        let shaken = acceptor.accept(stream);
                        let shaken = tokio::time::timeout(HANDSHAKE_DEADLINE, shaken).await;
                        shaken.ok()?.ok().map(|stream| (stream, peer))
                    });
                }
                Some(done) = self.handshakes.join_next() => {
                    if let Ok(Some(connection)) = done {
                        return connection;
                    }
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}
