//! A folder becomes an archive, entry by entry, as fast as the other side takes it.

use super::header::{BLOCK, Header, Kind};
use bytes::Bytes;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tokio::sync::mpsc;

const CHUNK: usize = 64 * 1024;
/// Pieces read ahead of the other side.
const QUEUE: usize = 2;

/// Starts packing; the receiver's pieces are the archive. An entry that cannot be read ends the
/// archive with an error, so that a partial one is not taken for whole.
pub fn pack(root: PathBuf) -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::task::spawn_local(async move {
        if let Err(error) = folder(&root, &sender).await {
            // Nobody is there to tell when the other side has gone.
            let _ = sender.send(Err(error)).await;
        }
    });
    receiver
}

type Sender = mpsc::Sender<io::Result<Bytes>>;

async fn send(sender: &Sender, bytes: Vec<u8>) -> io::Result<()> {
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    sender.send(Ok(bytes.into())).await.map_err(gone)
}

async fn folder(root: &Path, sender: &Sender) -> io::Result<()> {
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        let mut paths =
            fs::read_dir(&dir)?.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>()?;
        paths.sort_unstable();
        for path in paths {
            let Ok(name) = path.strip_prefix(root) else { continue };
            let meta = match fs::symlink_metadata(&path) {
                // Gone since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                meta => meta?,
            };
            let mut header = Header {
                kind: Kind::File,
                path: name.as_os_str().as_bytes().to_vec(),
                link: Vec::new(),
                mode: meta.mode() & 0o7777,
                uid: meta.uid(),
                gid: meta.gid(),
                size: 0,
                modified: u64::try_from(meta.mtime()).unwrap_or(0),
            };
            if meta.is_dir() {
                header.kind = Kind::Directory;
                header.path.push(b'/');
                todo.push(path);
            } else if meta.is_symlink() {
                header.kind = Kind::Symlink;
                header.link = fs::read_link(&path)?.as_os_str().as_bytes().to_vec();
            } else if meta.is_file() {
                header.size = meta.len();
                contents(&header, File::open(&path)?, sender).await?;
                continue;
            } else {
                continue; // sockets, pipes and devices have no contents
            }
            let mut bytes = Vec::new();
            header.write(&mut bytes);
            send(sender, bytes).await?;
        }
    }
    send(sender, vec![0; 2 * BLOCK]).await
}

async fn contents(header: &Header, mut file: File, sender: &Sender) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(BLOCK);
    header.write(&mut bytes);
    let mut left = header.size;
    while left > 0 {
        let start = bytes.len();
        let n = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        bytes.resize(start + n, 0);
        // A file that shrinks meanwhile cannot be told from here: its size has been announced.
        file.read_exact(&mut bytes[start..])?;
        left -= n as u64;
        if left > 0 {
            send(sender, std::mem::take(&mut bytes)).await?;
        }
    }
    // The announced size need not fill the last block, but all before it was in whole chunks.
    let tail = (header.size as usize).next_multiple_of(BLOCK) - header.size as usize;
    bytes.resize(bytes.len() + tail, 0);
    send(sender, bytes).await
}
