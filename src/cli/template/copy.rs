//! What a copy step carries: a tar archive, which is uploaded ahead and named by its digest, and the
//! folder it is unpacked in.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::super::cp::pack::{self, PackError};

/// The longest archive: it is held in memory to be digested and sent.
const MAX_ARCHIVE: usize = 512 << 20;

/// An archive to upload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// Its name in the service.
    pub sha256: String,
    /// The archive.
    pub bytes: Vec<u8>,
}

/// Something that cannot be copied into a template.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// It cannot be read.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// It is too long.
    #[error(
        "{} is {bytes} bytes as an archive, more than {MAX_ARCHIVE}: fetch it with a --run step \
         instead",
        src.display()
    )]
    TooLong {
        /// What was to be copied.
        src: PathBuf,
        /// Its length as an archive.
        bytes: usize,
    },
    /// The destination names no file.
    #[error("--copy {}:{dst}: a file needs a name at its destination", src.display())]
    NoName {
        /// What was to be copied.
        src: PathBuf,
        /// Where to.
        dst: String,
    },
}

/// `{"dst": FOLDER, "archive_sha256": DIGEST}`, and the archive. A folder's contents go into `dst`; a file becomes
/// `dst`, or goes into it when it ends with a slash.
pub fn step(src: &Path, dst: &str) -> Result<(Value, Archive), CopyError> {
    let (folder, archive) = if src.is_dir() {
        (dst, pack::folder_archive(src)?)
    } else {
        let no_name = || CopyError::NoName { src: src.to_owned(), dst: dst.to_owned() };
        let (folder, name) = dst.rsplit_once('/').ok_or_else(no_name)?;
        let name = match (name, src.file_name()) {
            ("", Some(own)) => Path::new(own),
            ("", None) => return Err(no_name()),
            (name, _) => Path::new(name),
        };
        (if folder.is_empty() { "/" } else { folder }, pack::file_archive(src, name)?)
    };
    if archive.len() > MAX_ARCHIVE {
        return Err(CopyError::TooLong { src: src.to_owned(), bytes: archive.len() });
    }
    let sha256 = hex::encode(Sha256::digest(&archive));
    Ok((json!({ "dst": folder, "archive_sha256": sha256 }), Archive { sha256, bytes: archive }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked((step, archive): &(Value, Archive)) -> Vec<(String, u64)> {
        assert_eq!(step["archive_sha256"], archive.sha256.as_str());
        let mut archive = tar::Archive::new(&archive.bytes[..]);
        let entries = archive.entries().unwrap().map(Result::unwrap);
        entries.map(|e| (e.path().unwrap().display().to_string(), e.size())).collect()
    }

    #[test]
    fn files_and_folders_land_as_with_cp() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("app.py");
        std::fs::write(&file, "print()").unwrap();
        let named = step(&file, "/srv/main.py").unwrap();
        assert_eq!(
            (named.0["dst"].as_str(), unpacked(&named)),
            (Some("/srv"), vec![("main.py".into(), 7)])
        );
        let into = step(&file, "/srv/").unwrap();
        assert_eq!(
            (into.0["dst"].as_str(), unpacked(&into)),
            (Some("/srv"), vec![("app.py".into(), 7)])
        );
        let root = step(&file, "/x").unwrap();
        assert_eq!(root.0["dst"], "/");
        let folder = step(dir.path(), "/srv").unwrap();
        assert_eq!(
            (folder.0["dst"].as_str(), unpacked(&folder)),
            (Some("/srv"), vec![("app.py".into(), 7)])
        );
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        assert!(matches!(step(Path::new("/nonexistent"), "/x"), Err(CopyError::Pack(_))));
    }
}
