//! Where the service is: a URL, taken apart once.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::ClientError;

/// How long a connection may take to come about.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// A byte stream to the service.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A parsed service URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// As the user wrote it, for messages.
    pub url: String,
    /// Value of the `Host` header.
    pub authority: String,
    /// What comes before `/v1` in every path.
    pub prefix: String,
    address: Address,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Address {
    Tcp(String, u16),
    Tls(String, u16),
    Unix(PathBuf),
}

impl Endpoint {
    /// Parses `http[s]://host[:port][/prefix]` or `unix:/path`.
    pub fn parse(url: &str) -> Result<Self, ClientError> {
        let bad = |reason: &str| ClientError::BadUrl { url: url.into(), reason: reason.into() };
        if let Some(path) = url.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') {
                return Err(bad("a unix: URL needs an absolute path, as in unix:/run/rethaw.sock"));
            }
            let address = Address::Unix(path.into());
            let authority = "localhost".to_owned();
            return Ok(Self { url: url.to_owned(), authority, prefix: String::new(), address });
        }
        let uri: hyper::Uri =
            url.parse().map_err(|_| bad("it should look like http://127.0.0.1:7070"))?;
        let (Some("http" | "https"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(bad("it should look like http://127.0.0.1:7070"));
        };
        // An IPv6 address is bracketed in a URL and bare in a socket address.
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let address = match uri.scheme_str() {
            Some("https") => Address::Tls(host, authority.port_u16().unwrap_or(443)),
            _ => Address::Tcp(host, authority.port_u16().unwrap_or(80)),
        };
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            authority: authority.as_str().to_owned(),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            address,
        })
    }

    /// Opens a connection.
    pub async fn connect(&self) -> Result<Box<dyn Stream>, ClientError> {
        let opened = tokio::time::timeout(CONNECT_DEADLINE, self.open()).await;
        let url = self.url.clone();
        match opened {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(source)) => Err(match source.kind() {
                std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound => {
                    ClientError::NotRunning { url }
                }
                _ => ClientError::Connect { url, source },
            }),
            Err(_) => {
                Err(ClientError::NoAnswer { url, what: "connection", after: CONNECT_DEADLINE })
            }
        }
    }

    async fn open(&self) -> std::io::Result<Box<dyn Stream>> {
        match &self.address {
            Address::Tcp(host, port) => Ok(Box::new(tcp(host, *port).await?)),
            Address::Tls(host, port) => {
                let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
                let stream = tcp(host, *port).await?;
                Ok(Box::new(connector()?.connect(name, stream).await?))
            }
            Address::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
        }
    }
}

async fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    // Terminal bytes and short requests: waiting to fill a segment only costs time.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Trusts whom the system trusts, or those in `SSL_CERT_FILE`.
fn connector() -> io::Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        let message = "no certificate authority is known here: install ca-certificates, or name a \
                       PEM file in SSL_CERT_FILE";
        return Err(io::Error::other(message));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(url: &str) -> (String, u16, String, String) {
        let endpoint = Endpoint::parse(url).unwrap();
        let Address::Tcp(host, port) = endpoint.address else { panic!("{url} is TCP") };
        (host, port, endpoint.prefix, endpoint.authority)
    }

    #[test]
    fn urls_are_taken_apart() {
        let own = |h: &str, p, x: &str, a: &str| (h.to_owned(), p, x.to_owned(), a.to_owned());
        assert_eq!(tcp("http://127.0.0.1:7070"), own("127.0.0.1", 7070, "", "127.0.0.1:7070"));
        assert_eq!(tcp("http://box/"), own("box", 80, "", "box"));
        assert_eq!(tcp("http://[::1]:9/a/b/"), own("::1", 9, "/a/b", "[::1]:9"));
        let tls = Endpoint::parse("https://box.example/").unwrap();
        assert_eq!(tls.address, Address::Tls("box.example".into(), 443));
        let unix = Endpoint::parse("unix:///run/r.sock").unwrap();
        assert_eq!(unix.address, Address::Unix("/run/r.sock".into()));
    }

    #[test]
    fn bad_urls_say_what_is_right() {
        for (url, hint) in [
            ("127.0.0.1:7070", "http://127.0.0.1:7070"),
            ("", "http://127.0.0.1:7070"),
            ("ftp://x", "http://127.0.0.1:7070"),
            ("unix:run/x", "absolute path"),
        ] {
            let message = Endpoint::parse(url).unwrap_err().to_string();
            assert!(message.contains(hint), "{url}: {message}");
        }
    }
}
