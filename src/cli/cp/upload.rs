//! From here into a sandbox.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use hyper::Method;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE};
use indicatif::ProgressBar;
use tokio_util::io::ReaderStream;

use super::super::client::{Client, IDLE, counted, encode};
use super::super::{Context, sandbox};
use super::download;
use super::place::{Place, remote_join, remote_name, remote_plain};
use super::{CpArgs, PIECE, pack, progress};

/// Longest silence of standard input: whoever writes it may have to compute it.
const INPUT_SILENCE: std::time::Duration = std::time::Duration::from_secs(3600);

/// One upload.
struct Upload<'a> {
    client: &'a Client,
    id: &'a str,
    user: Option<&'a str>,
    bar: ProgressBar,
}

/// Copies `src` to `path` in the sandbox; returns how many bytes were sent.
pub async fn run(
    cx: &Context,
    args: &CpArgs,
    src: &Place,
    name: &str,
    path: &str,
) -> anyhow::Result<u64> {
    let id = sandbox::resolve(&cx.client, name).await?;
    let mut upload = Upload {
        client: &cx.client,
        id: &id,
        user: args.user.as_deref(),
        bar: progress(args.quiet, None),
    };
    match src {
        Place::Local(local) => {
            let meta = tokio::fs::metadata(local).await;
            let meta = meta.with_context(|| format!("cannot read {}", local.display()))?;
            if meta.is_dir() {
                let target = folder_target(&upload, local, path).await?;
                return upload.folder(local.clone(), &target).await;
            }
            let target = file_target(&upload, local, path).await?;
            if meta.is_file() {
                upload.bar = progress(args.quiet, Some(meta.len()));
            }
            upload.file(local, &target).await
        }
        _ if args.tar => {
            let input = ReaderStream::with_capacity(tokio::io::stdin(), PIECE);
            upload.send(path, TAR, None, None, input).await
        }
        _ => {
            let named = remote_name(path).is_some() && !path.ends_with('/');
            anyhow::ensure!(named, "standard input has no name: add one to {path}");
            let input = ReaderStream::with_capacity(tokio::io::stdin(), PIECE);
            upload.send(path, BYTES, None, None, input).await
        }
    }
}

/// Media type of a folder.
pub const TAR: &str = "application/x-tar";
const BYTES: &str = "application/octet-stream";

/// As `cp` has it: a file goes into a folder, and else under the name given.
async fn file_target(upload: &Upload<'_>, local: &Path, path: &str) -> anyhow::Result<String> {
    if path.ends_with('/') || download::is_folder(upload.client, upload.id, path).await? {
        return Ok(remote_join(path, &local_name(local)?));
    }
    Ok(path.to_owned())
}

/// A folder goes into a folder that is there, unless it was given as `FOLDER/.`.
async fn folder_target(upload: &Upload<'_>, local: &Path, path: &str) -> anyhow::Result<String> {
    let contents_only =
        local.as_os_str().as_encoded_bytes().ends_with(b"/.") || local == Path::new(".");
    if !contents_only && download::is_folder(upload.client, upload.id, path).await? {
        return Ok(remote_join(path, &local_name(local)?));
    }
    Ok(path.to_owned())
}

/// The name of a local file or folder, also where it is written as `..`.
fn local_name(local: &Path) -> anyhow::Result<String> {
    let named = match local.file_name() {
        Some(name) => name.to_owned(),
        None => {
            let full = local.canonicalize()?;
            full.file_name().context("/ has no name to give; copy it as /.")?.to_owned()
        }
    };
    named.into_string().map_err(|name| anyhow::anyhow!("{} is not UTF-8", name.display()))
}

impl Upload<'_> {
    async fn file(&self, local: &Path, target: &str) -> anyhow::Result<u64> {
        let read = || format!("cannot read {}", local.display());
        let file = tokio::fs::File::open(local).await.with_context(read)?;
        let meta = file.metadata().await.with_context(read)?;
        // A pipe or device has no length to promise.
        let (length, mode) = match meta.is_file() {
            true => (Some(meta.len()), Some(meta.permissions().mode() & 0o777)),
            false => (None, None),
        };
        let contents = ReaderStream::with_capacity(file, PIECE);
        self.send(target, BYTES, length, mode, contents).await
    }

    async fn folder(&self, local: PathBuf, target: &str) -> anyhow::Result<u64> {
        let (archive, packing) = pack::pack(local);
        let sent = self.send(target, TAR, None, None, archive).await;
        match (sent, packing.await?) {
            (sent, Ok(())) => sent,
            // Not the cause: the other side went away first.
            (Err(e), Err(pack::PackError::NotTaken(_))) => Err(e),
            (_, Err(e)) => Err(e.into()),
        }
    }

    async fn send(
        &self,
        target: &str,
        media_type: &str,
        length: Option<u64>,
        mode: Option<u32>,
        contents: impl Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    ) -> anyhow::Result<u64> {
        let mut uri =
            format!("/v1/sandboxes/{}/files?path={}", self.id, encode(remote_plain(target)));
        if let Some(mode) = mode {
            uri.push_str(&format!("&mode={mode:o}"));
        }
        if let Some(user) = self.user {
            uri.push_str(&format!("&user={}", encode(user)));
        }
        let mut request = self.client.request(Method::PUT, &uri).header(CONTENT_TYPE, media_type);
        if let Some(length) = length {
            request = request.header(CONTENT_LENGTH, length);
        }
        let sent = Arc::new(AtomicU64::new(0));
        let bar = self.bar.clone();
        let contents = contents.inspect(move |piece| {
            bar.inc(piece.as_ref().map_or(0, Bytes::len) as u64);
        });
        let request = request.body(counted(contents, Arc::clone(&sent)))?;
        let silence = if length.is_some() { IDLE } else { INPUT_SILENCE };
        self.client.send_counted(request, silence, &sent).await?;
        self.bar.finish_and_clear();
        Ok(sent.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_names() {
        assert_eq!(local_name(Path::new("a/b")).unwrap(), "b");
        assert_eq!(local_name(Path::new("a/b/")).unwrap(), "b");
        let here = std::env::current_dir().unwrap();
        let parent = here.parent().unwrap().file_name().unwrap().to_str().unwrap();
        assert_eq!(local_name(Path::new("..")).unwrap(), parent);
        assert!(local_name(Path::new("/")).is_err());
    }
}
