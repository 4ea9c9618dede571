//! A stream of tar into a folder. The archive comes out of a sandbox, so nothing in it is trusted:
//! no entry may land outside the folder, and no device is made.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::super::output;
use super::IN_FLIGHT;

/// An archive that cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The folder cannot be made.
    #[error("cannot make {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An entry cannot be written.
    #[error("cannot write {} into {}: {}", entry.display(), dir.display(), reason(source))]
    Write {
        /// Its name in the archive.
        entry: PathBuf,
        /// The folder.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An entry would land elsewhere.
    #[error("the archive has an entry {:?} that would land outside the folder", .0.display())]
    Escapes(PathBuf),
    /// It is no archive, or it is cut off.
    #[error("the archive cannot be read: {0}")]
    Archive(io::Error),
}

/// tar's errors keep the reason inside.
fn reason(error: &io::Error) -> String {
    super::super::client::reason(error)
}

/// Unpacks into `dir` what is sent; the handle tells how it went.
pub fn unpack(
    dir: PathBuf,
) -> (mpsc::Sender<io::Result<Bytes>>, JoinHandle<Result<(), UnpackError>>) {
    let (sender, receiver) = mpsc::channel(IN_FLIGHT);
    let pipe = Pipe { receiver, piece: Bytes::new() };
    (sender, tokio::task::spawn_blocking(move || read_archive(&dir, pipe)))
}

struct Pipe {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let length = self.piece.len().min(buffer.len());
        self.piece.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

fn read_archive(dir: &Path, pipe: impl Read) -> Result<(), UnpackError> {
    let folder = |source| UnpackError::Folder { path: dir.to_owned(), source };
    std::fs::create_dir_all(dir).map_err(folder)?;
    let mut archive = tar::Archive::new(pipe);
    let mut folders = Vec::new();
    for entry in archive.entries().map_err(UnpackError::Archive)? {
        let mut entry = entry.map_err(UnpackError::Archive)?;
        let name = entry.path().map_err(UnpackError::Archive)?.into_owned();
        if name.components().all(|part| part == std::path::Component::CurDir) {
            continue;
        }
        let kind = entry.header().entry_type();
        if kind.is_block_special() || kind.is_character_special() || kind.is_fifo() {
            output::note(&format!("{}: not copied, it is a device or pipe", name.display()));
            continue;
        }
        if kind.is_dir() {
            // Last, or a folder without write permission could not be filled.
            folders.push(entry);
            continue;
        }
        put(dir, &mut entry, name)?;
    }
    folders.sort_by_key(|entry| std::cmp::Reverse(entry.path_bytes().to_vec()));
    for mut entry in folders {
        let name = entry.path().map_err(UnpackError::Archive)?.into_owned();
        put(dir, &mut entry, name)?;
    }
    // What follows the last entry is read too, so that a cut-off transfer is noticed.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(UnpackError::Archive)?;
    Ok(())
}

fn put(dir: &Path, entry: &mut tar::Entry<impl Read>, name: PathBuf) -> Result<(), UnpackError> {
    match entry.unpack_in(dir) {
        Ok(true) => Ok(()),
        Ok(false) => Err(UnpackError::Escapes(name)),
        Err(source) => Err(UnpackError::Write { entry: name, dir: dir.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn archive(entries: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, data) in entries {
            let mut header = tar::Header::new_gnu();
            // Set by hand: the builder itself refuses names that escape.
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            if kind.is_symlink() {
                header.set_link_name(std::str::from_utf8(data).unwrap()).unwrap();
            }
            let data = if kind.is_symlink() { &[][..] } else { data };
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    use tar::EntryType as Kind;

    #[test]
    fn files_and_folders_are_made() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("new");
        let bytes = archive(&[
            ("./", Kind::Directory, b""),
            ("./sub/", Kind::Directory, b""),
            ("./sub/file", Kind::Regular, b"x"),
            ("pipe", Kind::Fifo, b""),
        ]);
        read_archive(&target, &bytes[..]).unwrap();
        assert_eq!(fs::read(target.join("sub/file")).unwrap(), b"x");
        assert!(!target.join("pipe").exists());
    }

    #[test]
    fn nothing_lands_outside() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("in");
        let dots = archive(&[("../out", Kind::Regular, b"x")]);
        assert!(matches!(read_archive(&target, &dots[..]), Err(UnpackError::Escapes(_))));
        let link = archive(&[("door", Kind::Symlink, b".."), ("door/out", Kind::Regular, b"x")]);
        assert!(read_archive(&target, &link[..]).is_err());
        let root = format!("{}/out", dir.path().display());
        let absolute = archive(&[(&root, Kind::Regular, b"x")]);
        // A leading slash is taken off, as tar itself does.
        read_archive(&target, &absolute[..]).unwrap();
        assert!(!dir.path().join("out").exists());
    }

    #[test]
    fn a_cut_off_archive_is_no_success() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = archive(&[("file", Kind::Regular, &[7; 5000])]);
        assert!(read_archive(dir.path(), &bytes[..3000]).is_err());
    }
}
