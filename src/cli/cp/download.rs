//! Out of a sandbox to here.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use hyper::body::Incoming;
use hyper::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use hyper::{Method, Response};
use tokio::io::AsyncWriteExt;

use super::super::client::{Client, ClientError, Frames, IDLE, QUICK, empty, encode};
use super::super::{Context, output, sandbox};
use super::place::{Place, remote_name, remote_plain};
use super::upload::TAR;
use super::{CpArgs, progress, unpack};

/// What a path in a sandbox is, with its bytes to come.
enum Found {
    File(Response<Incoming>),
    Folder(Response<Incoming>),
}

/// Copies `path` in the sandbox to `dst`; returns how many bytes came.
pub async fn run(
    cx: &Context,
    args: &CpArgs,
    name: &str,
    path: &str,
    dst: &Place,
) -> anyhow::Result<u64> {
    let id = sandbox::resolve(&cx.client, name).await?;
    let found = open(&cx.client, &id, path).await?;
    let (Found::File(response) | Found::Folder(response)) = &found;
    let length = response.headers().get(CONTENT_LENGTH);
    let length = length.and_then(|value| value.to_str().ok()?.parse().ok());
    let bar = progress(args.quiet || matches!(dst, Place::Standard), length);
    let count = |bytes: usize| bar.inc(bytes as u64);
    let copied = match (found, dst) {
        (Found::File(response), Place::Local(local)) => {
            let target = file_target(local, path)?;
            write_file(cx.client.frames(response), &target, count).await?
        }
        (Found::Folder(response), Place::Local(local)) => {
            let target = folder_target(local, path)?;
            write_folder(cx.client.frames(response), target, count).await?
        }
        (Found::File(response) | Found::Folder(response), _) => {
            write_out(cx.client.frames(response)).await?
        }
    };
    bar.finish_and_clear();
    Ok(copied)
}

/// Whether `path` in the sandbox is a folder that is there.
pub async fn is_folder(client: &Client, id: &str, path: &str) -> anyhow::Result<bool> {
    match get(client, id, path, "application/octet-stream").await {
        // The bytes are not read: dropping the reply ends the transfer.
        Ok(response) => Ok(is_tar(&response)),
        Err(e) => match e.error_code() {
            Some("is_a_directory") => Ok(true),
            Some("file_not_found" | "not_a_file" | "not_a_directory") => Ok(false),
            _ => Err(e.into()),
        },
    }
}

async fn open(client: &Client, id: &str, path: &str) -> Result<Found, ClientError> {
    match get(client, id, path, "application/octet-stream").await {
        Ok(response) if is_tar(&response) => Ok(Found::Folder(response)),
        Ok(response) => Ok(Found::File(response)),
        Err(e) if e.error_code() == Some("is_a_directory") => {
            Ok(Found::Folder(get(client, id, path, TAR).await?))
        }
        Err(e) => Err(e),
    }
}

async fn get(
    client: &Client,
    id: &str,
    path: &str,
    accept: &str,
) -> Result<Response<Incoming>, ClientError> {
    let uri = format!("/v1/sandboxes/{id}/files?path={}", encode(remote_plain(path)));
    let request = client.request(Method::GET, &uri).header(ACCEPT, accept).body(empty());
    client.send(request.map_err(|e| client.bad_request(&e))?, QUICK).await
}

fn is_tar(response: &Response<Incoming>) -> bool {
    response.headers().get(CONTENT_TYPE).is_some_and(|value| value.as_bytes() == TAR.as_bytes())
}

fn file_target(local: &Path, path: &str) -> anyhow::Result<PathBuf> {
    if local.is_dir() || local.as_os_str().as_encoded_bytes().ends_with(b"/") {
        let name = remote_name(path).with_context(|| format!("{path} has no name to give"))?;
        return Ok(local.join(name));
    }
    Ok(local.to_owned())
}

fn folder_target(local: &Path, path: &str) -> anyhow::Result<PathBuf> {
    match remote_name(path) {
        Some(name) if local.is_dir() => Ok(local.join(name)),
        // `/` and `FOLDER/.` have no name: their contents go where they are told to.
        _ if local.exists() && !local.is_dir() => {
            anyhow::bail!("{} is a file; {path} is a folder", local.display())
        }
        _ => Ok(local.to_owned()),
    }
}

/// Beside the target first, then over it: a transfer that breaks leaves the old file as it was.
async fn write_file(
    mut frames: Frames,
    target: &Path,
    count: impl Fn(usize),
) -> anyhow::Result<u64> {
    let write = || format!("cannot write {}", target.display());
    // A device or pipe is written to, not replaced.
    let special = std::fs::metadata(target).is_ok_and(|meta| !meta.is_file());
    let part = if special { Part::direct(target) } else { Part::beside(target)? };
    let mut file = part.open().await.with_context(write)?;
    let mut copied = 0;
    while let Some(bytes) = frames.next(IDLE).await? {
        file.write_all(&bytes).await.with_context(write)?;
        copied += bytes.len() as u64;
        count(bytes.len());
    }
    file.flush().await.with_context(write)?;
    part.keep(target).with_context(write)?;
    Ok(copied)
}

/// A file being written; removed again unless it is kept.
struct Part {
    path: PathBuf,
    temporary: bool,
}

impl Part {
    fn direct(target: &Path) -> Self {
        Self { path: target.to_owned(), temporary: false }
    }

    fn beside(target: &Path) -> anyhow::Result<Self> {
        // A link stays a link; what it points at is replaced.
        let target = target.canonicalize().unwrap_or_else(|_| target.to_owned());
        let name = target.file_name().context("the destination has no file name")?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".rethaw-{}", std::process::id()));
        Ok(Self { path: target.with_file_name(hidden), temporary: true })
    }

    async fn open(&self) -> std::io::Result<tokio::fs::File> {
        let mut options = tokio::fs::OpenOptions::new();
        options.write(true);
        if self.temporary {
            options.create(true).truncate(true);
        }
        options.open(&self.path).await
    }

    fn keep(mut self, target: &Path) -> std::io::Result<()> {
        if self.temporary {
            let target = target.canonicalize().unwrap_or_else(|_| target.to_owned());
            if let Ok(old) = std::fs::metadata(&target) {
                std::fs::set_permissions(&self.path, old.permissions())?;
            }
            std::fs::rename(&self.path, target)?;
            self.temporary = false;
        }
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.temporary {
            // The error that led here is the one to tell.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

async fn write_folder(
    mut frames: Frames,
    target: PathBuf,
    count: impl Fn(usize),
) -> anyhow::Result<u64> {
    let (sender, unpacking) = unpack::unpack(target);
    let mut copied = 0;
    let mut broken = None;
    loop {
        match frames.next(IDLE).await {
            Ok(Some(bytes)) => {
                copied += bytes.len() as u64;
                count(bytes.len());
                // A thread that has gone tells why below.
                if sender.send(Ok(bytes)).await.is_err() {
                    break;
                }
            }
            Ok(None) => break,
            Err(e) => {
                // Or the thread would take the end of the stream for the end of the archive.
                let _ = sender.send(Err(std::io::Error::other("cut off"))).await;
                broken = Some(e);
                break;
            }
        }
    }
    drop(sender);
    let unpacked = unpacking.await?;
    if let Some(e) = broken {
        return Err(e.into());
    }
    unpacked?;
    Ok(copied)
}

async fn write_out(mut frames: Frames) -> anyhow::Result<u64> {
    let mut copied = 0;
    while let Some(bytes) = frames.next(IDLE).await? {
        output::write(&bytes)?;
        copied += bytes.len() as u64;
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_as_with_cp() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert_eq!(file_target(dir.path(), "/a/b").unwrap(), dir.path().join("b"));
        assert_eq!(file_target(&file, "/a/b").unwrap(), file);
        assert_eq!(file_target(Path::new("new/"), "/a/b").unwrap(), Path::new("new/b"));
        assert!(file_target(dir.path(), "/").is_err());

        assert_eq!(folder_target(dir.path(), "/a/b/").unwrap(), dir.path().join("b"));
        assert_eq!(folder_target(dir.path(), "/a/.").unwrap(), dir.path());
        assert_eq!(folder_target(Path::new("new"), "/a/b").unwrap(), Path::new("new"));
        assert!(folder_target(&file, "/a/b").is_err());
    }

    #[tokio::test]
    async fn a_part_that_is_not_kept_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("file");
        std::fs::write(&target, "old").unwrap();
        let part = Part::beside(&target).unwrap();
        part.open().await.unwrap().write_all(b"half").await.unwrap();
        drop(part);
        assert_eq!(std::fs::read(&target).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let part = Part::beside(&target).unwrap();
        let mut file = part.open().await.unwrap();
        file.write_all(b"new").await.unwrap();
        file.flush().await.unwrap();
        part.keep(&target).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
    }
}
