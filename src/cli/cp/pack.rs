//! A folder as a stream of tar, made on a thread of its own while it is being sent.

use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::Stream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::super::output;
use super::{IN_FLIGHT, PIECE};

/// A folder that cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Something in it cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It has another length than its entry says.
    #[error("{} changed while it was being copied", .0.display())]
    Changed(PathBuf),
    /// Whoever takes the archive has gone.
    #[error("the archive was not taken to its end")]
    NotTaken(#[source] io::Error),
}

/// Packs what is in `dir`, without the folder itself. The handle tells how it went.
pub fn pack(
    dir: PathBuf,
) -> (impl Stream<Item = io::Result<Bytes>> + Send + 'static, JoinHandle<Result<(), PackError>>) {
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(IN_FLIGHT);
    let thread = tokio::task::spawn_blocking(move || {
        let result = write_archive(&dir, Pipe(sender.clone()));
        if let Err(e) = &result {
            // The reader must not take what it has for a whole archive.
            let _ = sender.blocking_send(Err(io::Error::other(e.to_string())));
        }
        result
    });
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|piece| (piece, receiver))
    });
    (stream, thread)
}

/// A time for archives that are to be the same whenever the same files are packed: a fresh checkout
/// of the same sources must not look like a change.
const FIXED_TIME: u64 = 1;

/// What is in a folder, as an archive in memory that depends on names, modes and contents alone.
pub fn folder_archive(dir: &Path) -> Result<Vec<u8>, PackError> {
    let mut packer = Packer { archive: tar::Builder::new(Vec::new()), modified: Some(FIXED_TIME) };
    packer.add_folder(dir, Path::new(""))?;
    packer.finish()
}

/// As [`folder_archive`], of one file under another name.
pub fn file_archive(file: &Path, name: &Path) -> Result<Vec<u8>, PackError> {
    let mut packer = Packer { archive: tar::Builder::new(Vec::new()), modified: Some(FIXED_TIME) };
    packer.add_file(file, name)?;
    packer.finish()
}

struct Pipe(mpsc::Sender<io::Result<Bytes>>);

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = Bytes::copy_from_slice(bytes);
        self.0.blocking_send(Ok(piece)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_archive(dir: &Path, out: impl Write) -> Result<(), PackError> {
    let out = BufWriter::with_capacity(PIECE, out);
    let mut packer = Packer { archive: tar::Builder::new(out), modified: None };
    packer.add_folder(dir, Path::new(""))?;
    packer.finish()?.flush().map_err(PackError::NotTaken)
}

/// An archive being written.
struct Packer<W: Write> {
    archive: tar::Builder<W>,
    /// One time for all entries, in place of their own.
    modified: Option<u64>,
}

impl<W: Write> Packer<W> {
    fn add_folder(&mut self, dir: &Path, name: &Path) -> Result<(), PackError> {
        let read = |source| PackError::Read { path: dir.to_owned(), source };
        let mut entries =
            fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(read)?;
        // The same folder gives the same archive.
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, name) = (entry.path(), name.join(entry.file_name()));
            let read = |source| PackError::Read { path: path.clone(), source };
            let meta = fs::symlink_metadata(&path).map_err(read)?;
            let kind = meta.file_type();
            if kind.is_dir() {
                let mut header = self.header(&meta, tar::EntryType::Directory, 0);
                self.archive
                    .append_data(&mut header, &name, io::empty())
                    .map_err(PackError::NotTaken)?;
                self.add_folder(&path, &name)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).map_err(read)?;
                let mut header = self.header(&meta, tar::EntryType::Symlink, 0);
                self.archive
                    .append_link(&mut header, &name, target)
                    .map_err(PackError::NotTaken)?;
            } else if kind.is_file() {
                self.add_file(&path, &name)?;
            } else {
                output::note(&format!(
                    "{}: not copied, it is no file, folder or link",
                    path.display()
                ));
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path, name: &Path) -> Result<(), PackError> {
        let read = |source| PackError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        let meta = file.metadata().map_err(read)?;
        let mut contents = Counted { inner: file.take(meta.len()), count: 0, error: None };
        let mut header = self.header(&meta, tar::EntryType::Regular, meta.len());
        let added = self.archive.append_data(&mut header, name, &mut contents);
        if let Some(source) = contents.error {
            return Err(PackError::Read { path: path.to_owned(), source });
        }
        added.map_err(PackError::NotTaken)?;
        if contents.count == meta.len() { Ok(()) } else { Err(PackError::Changed(path.to_owned())) }
    }

    fn header(&self, meta: &Metadata, kind: tar::EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_metadata(meta);
        // This host's users mean nothing in a sandbox.
        header.set_uid(0);
        header.set_gid(0);
        if let Some(modified) = self.modified {
            header.set_mtime(modified);
        }
        header.set_entry_type(kind);
        header.set_size(size);
        header
    }

    fn finish(self) -> Result<W, PackError> {
        self.archive.into_inner().map_err(PackError::NotTaken)
    }
}

/// Knows how much was read, and keeps a read error apart from a write error.
struct Counted<R> {
    inner: R,
    count: u64,
    error: Option<io::Error>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buffer) {
            Ok(read) => {
                self.count += read as u64;
                Ok(read)
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Err(e),
            Err(e) => {
                let kind = e.kind();
                self.error = Some(e);
                Err(kind.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_folder_comes_out_as_it_went_in() {
        let dir = tempfile::tempdir().unwrap();
        let long = "n".repeat(150);
        fs::create_dir_all(dir.path().join("sub/empty")).unwrap();
        fs::write(dir.path().join("sub").join(&long), "deep").unwrap();
        fs::write(dir.path().join("tool"), vec![7; 3 * PIECE]).unwrap();
        fs::set_permissions(dir.path().join("tool"), fs::Permissions::from_mode(0o750)).unwrap();
        symlink("tool", dir.path().join("link")).unwrap();
        let mut bytes = Vec::new();
        write_archive(dir.path(), &mut bytes).unwrap();

        let out = tempfile::tempdir().unwrap();
        tar::Archive::new(&bytes[..]).unpack(out.path()).unwrap();
        assert!(out.path().join("sub/empty").is_dir());
        assert_eq!(fs::read(out.path().join("sub").join(long)).unwrap(), b"deep");
        let tool = fs::metadata(out.path().join("tool")).unwrap();
        assert_eq!((tool.len(), tool.permissions().mode() & 0o777), (3 * PIECE as u64, 0o750));
        assert_eq!(fs::read_link(out.path().join("link")).unwrap(), Path::new("tool"));
    }

    #[test]
    fn a_fresh_checkout_is_no_change() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for (dir, age) in dirs.iter().zip([0, 1000]) {
            fs::create_dir(dir.path().join("sub")).unwrap();
            let path = dir.path().join("sub/file");
            fs::write(&path, "x").unwrap();
            let then = std::time::SystemTime::now() - std::time::Duration::from_secs(age);
            File::open(&path).unwrap().set_modified(then).unwrap();
        }
        let [one, two] = dirs.each_ref().map(|dir| folder_archive(dir.path()).unwrap());
        assert_eq!(one, two);
        fs::write(dirs[1].path().join("sub/file"), "y").unwrap();
        assert_ne!(one, folder_archive(dirs[1].path()).unwrap());
    }

    #[tokio::test]
    async fn an_unreadable_folder_is_named() {
        use futures_util::StreamExt;
        let (stream, thread) = pack("/nonexistent/folder".into());
        let pieces: Vec<_> = stream.collect().await;
        assert!(pieces.last().unwrap().is_err(), "the archive must not look whole");
        let error = thread.await.unwrap().unwrap_err().to_string();
        assert!(error.contains("/nonexistent/folder"), "{error}");
    }
}
