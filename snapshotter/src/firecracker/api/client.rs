//! The client: one connection per call, a deadline on each.
//!
//! Firecracker answers from one thread and a call that touches guest memory can take long, so a
//! connection is never shared: a call that ran into its deadline leaves nothing behind that a later
//! call would have to wait for.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::machine::{InstanceInfo, InstanceState};
use super::{
    BootSource, CpuTemplate, Drive, EntropyDevice, MachineConfig, NetworkInterface, RateLimiter,
    SnapshotCreate, SnapshotLoad, VmState, VsockDevice,
};
use crate::firecracker::version::{UnsupportedField, Version};

/// No answer of Firecracker's comes near this.
const MAX_ANSWER: usize = 256 * 1024;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The running version lacks something that was asked for. Nothing was sent.
    #[error(transparent)]
    UnsupportedField(#[from] UnsupportedField),
    /// The socket could not be reached or broke.
    #[error("{call}: {source}")]
    Io {
        /// Method and path.
        call: String,
        /// What happened.
        source: io::Error,
    },
    /// Firecracker refused, in its own words.
    #[error("{call}: {status}: {fault_message}")]
    Refused {
        /// Method and path.
        call: String,
        /// HTTP status.
        status: u16,
        /// Firecracker's `fault_message`.
        fault_message: String,
    },
    /// The deadline passed.
    #[error("{call}: no answer within {after:?}")]
    Timeout {
        /// Method and path.
        call: String,
        /// The deadline.
        after: Duration,
    },
    /// The answer was not what the API promises.
    #[error("{call}: {message}")]
    Protocol {
        /// Method and path.
        call: String,
        /// What was wrong.
        message: String,
    },
}

/// A client of one Firecracker process.
#[derive(Debug, Clone)]
pub struct ApiClient {
    socket: PathBuf,
    version: Version,
}

impl ApiClient {
    /// A client of the Firecracker `version` that listens on `socket`.
    pub fn new(socket: impl Into<PathBuf>, version: Version) -> Self {
        Self { socket: socket.into(), version }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `GET /`
    pub async fn instance(&self, deadline: Duration) -> Result<InstanceInfo, ApiError> {
        self.get("/", deadline).await
    }

    /// `PUT /machine-config`
    pub async fn put_machine(&self, m: &MachineConfig, d: Duration) -> Result<(), ApiError> {
        self.put("/machine-config", &m.body(self.version)?, d).await
    }

    /// `PUT /cpu-config`
    pub async fn put_cpu(&self, template: &CpuTemplate, d: Duration) -> Result<(), ApiError> {
        self.put("/cpu-config", template, d).await
    }

    /// `PUT /boot-source`
    pub async fn put_boot_source(&self, source: &BootSource, d: Duration) -> Result<(), ApiError> {
        self.put("/boot-source", source, d).await
    }

    /// `PUT /drives/{drive_id}`
    pub async fn put_drive(&self, drive: &Drive, d: Duration) -> Result<(), ApiError> {
        self.put(&format!("/drives/{}", drive.drive_id), drive, d).await
    }

    /// `PATCH /drives/{drive_id}`: gives a drive other limits.
    pub async fn limit_drive(
        &self,
        drive_id: &str,
        limiter: RateLimiter,
        d: Duration,
    ) -> Result<(), ApiError> {
        let body = serde_json::json!({ "drive_id": drive_id, "rate_limiter": limiter });
        self.patch(&format!("/drives/{drive_id}"), &body, d).await
    }

    /// `PUT /network-interfaces/{iface_id}`
    pub async fn put_nic(&self, nic: &NetworkInterface, d: Duration) -> Result<(), ApiError> {
        self.put(&format!("/network-interfaces/{}", nic.iface_id), nic, d).await
    }

    /// `PATCH /network-interfaces/{iface_id}`: gives a NIC other limits.
    pub async fn limit_nic(
        &self,
        iface_id: &str,
        rx: Option<RateLimiter>,
        tx: Option<RateLimiter>,
        d: Duration,
    ) -> Result<(), ApiError> {
        let mut body = serde_json::json!({ "iface_id": iface_id });
        for (name, limiter) in [("rx_rate_limiter", rx), ("tx_rate_limiter", tx)] {
            if let Some(limiter) = limiter {
                body[name] = serde_json::json!(limiter);
            }
        }
        self.patch(&format!("/network-interfaces/{iface_id}"), &body, d).await
    }

    /// `PUT /vsock`
    pub async fn put_vsock(&self, vsock: &VsockDevice, d: Duration) -> Result<(), ApiError> {
        self.put("/vsock", vsock, d).await
    }

    /// `PUT /entropy`
    pub async fn put_entropy(&self, device: &EntropyDevice, d: Duration) -> Result<(), ApiError> {
        self.put("/entropy", device, d).await
    }

    /// `PUT /actions` `InstanceStart`
    pub async fn start(&self, d: Duration) -> Result<(), ApiError> {
        self.put("/actions", &serde_json::json!({ "action_type": "InstanceStart" }), d).await
    }

    /// `PATCH /vm`
    pub async fn patch_vm(&self, state: VmState, d: Duration) -> Result<(), ApiError> {
        self.patch("/vm", &serde_json::json!({ "state": state }), d).await
    }

    /// `PUT /snapshot/create`
    pub async fn create_snapshot(&self, s: &SnapshotCreate, d: Duration) -> Result<(), ApiError> {
        self.put("/snapshot/create", s, d).await
    }

    /// `PUT /snapshot/load`. Firecracker exits when this fails.
    pub async fn load_snapshot(&self, s: &SnapshotLoad, d: Duration) -> Result<(), ApiError> {
        self.put("/snapshot/load", &s.body(self.version)?, d).await
    }

    /// Whether the VM runs, in Firecracker's own view.
    pub async fn is_running(&self, deadline: Duration) -> Result<bool, ApiError> {
        Ok(self.instance(deadline).await?.state == InstanceState::Running)
    }

    async fn get<T: DeserializeOwned>(&self, path: &str, d: Duration) -> Result<T, ApiError> {
        let body = self.call(Method::GET, path, Bytes::new(), d).await?;
        serde_json::from_slice(&body).map_err(|e| ApiError::Protocol {
            call: format!("GET {path}"),
            message: format!("{e} in {:?}", String::from_utf8_lossy(&body)),
        })
    }

    async fn put(&self, path: &str, body: &impl Serialize, d: Duration) -> Result<(), ApiError> {
        self.send(Method::PUT, path, body, d).await
    }

    async fn patch(&self, path: &str, body: &impl Serialize, d: Duration) -> Result<(), ApiError> {
        self.send(Method::PATCH, path, body, d).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        deadline: Duration,
    ) -> Result<(), ApiError> {
        let body = serde_json::to_vec(body).map_err(|e| ApiError::Protocol {
            call: format!("{method} {path}"),
            message: e.to_string(),
        })?;
        self.call(method, path, body.into(), deadline).await.map(|_| ())
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, ApiError> {
        let call = format!("{method} {path}");
        match tokio::time::timeout(deadline, self.exchange(&call, method, path, body)).await {
            Ok(result) => result,
            Err(_) => Err(ApiError::Timeout { call, after: deadline }),
        }
    }

    async fn exchange(
        &self,
        call: &str,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, ApiError> {
        let broken = |source| ApiError::Io { call: call.to_owned(), source };
        let stream = connect(&self.socket).await.map_err(broken)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| broken(io::Error::other(e)))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("accept", "application/json")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|e| broken(io::Error::other(e)))?;
        let exchange = async {
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
            Ok::<_, hyper::Error>((status, body.map(http_body_util::Collected::to_bytes)))
        };
        let mut exchange = std::pin::pin!(exchange);
        // The connection is driven here and not in a task: it ends with the call, whatever happens.
        let answer = tokio::select! {
            biased;
            answer = &mut exchange => answer,
            end = connection => match end {
                // Closed, perhaps right after the answer: then that is there already.
                Ok(()) => exchange.await,
                Err(e) => Err(e),
            },
        };
        let (status, body) = answer.map_err(|e| broken(io::Error::other(e)))?;
        let body = body.map_err(|e| broken(io::Error::other(e)))?;
        if status == StatusCode::OK || status == StatusCode::NO_CONTENT {
            return Ok(body);
        }
        Err(ApiError::Refused {
            call: call.to_owned(),
            status: status.as_u16(),
            fault_message: fault_message(&body),
        })
    }
}

/// Firecracker's own text out of an error answer, or the answer itself.
fn fault_message(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Fault {
        fault_message: String,
    }
    serde_json::from_slice::<Fault>(body)
        .map_or_else(|_| String::from_utf8_lossy(body).into_owned(), |f| f.fault_message)
}

/// Connects to a unix socket whose path may be longer than a socket address can hold.
pub(crate) async fn connect(socket: &Path) -> io::Result<UnixStream> {
    let (_dir, short) = short_path(socket)?;
    UnixStream::connect(short).await
}

/// A short name for `socket`, through a descriptor of its folder that must stay open while the name
/// is in use: jails nest deeper than the 107 bytes of a socket address.
pub(crate) fn short_path(socket: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("{socket:?} is no path"));
    let (parent, name) = socket.parent().zip(socket.file_name()).ok_or_else(invalid)?;
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let dir = rustix::fs::open(
        parent,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    Ok((dir, short))
}

#[cfg(test)]
mod tests;
