//! What a copy step carries: a tar archive and the folder it is unpacked in.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::super::cp::pack::{self, PackError};

/// All that copies can bring into one build: the request they travel in may be 1 MiB long, and
/// base64 takes four bytes for three.
const MAX_ARCHIVE: usize = 700 << 10;

/// Something that cannot be copied into a template.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// It cannot be read.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// It is too long.
    #[error(
        "{} is {bytes} bytes as an archive, and a build request holds {MAX_ARCHIVE}: fetch it with \
         a --run step instead",
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

/// `{"dst": FOLDER, "archive_base64": TAR}`. A folder's contents go into `dst`; a file becomes
/// `dst`, or goes into it when it ends with a slash.
pub fn step(src: &Path, dst: &str) -> Result<Value, CopyError> {
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
    Ok(json!({ "dst": folder, "archive_base64": STANDARD.encode(archive) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(step: &Value) -> Vec<(String, u64)> {
        let bytes = STANDARD.decode(step["archive_base64"].as_str().unwrap()).unwrap();
        let mut archive = tar::Archive::new(&bytes[..]);
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
            (named["dst"].as_str(), unpacked(&named)),
            (Some("/srv"), vec![("main.py".into(), 7)])
        );
        let into = step(&file, "/srv/").unwrap();
        assert_eq!(
            (into["dst"].as_str(), unpacked(&into)),
            (Some("/srv"), vec![("app.py".into(), 7)])
        );
        let root = step(&file, "/x").unwrap();
        assert_eq!(root["dst"], "/");
        let folder = step(dir.path(), "/srv").unwrap();
        assert_eq!(
            (folder["dst"].as_str(), unpacked(&folder)),
            (Some("/srv"), vec![("app.py".into(), 7)])
        );
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("big"), vec![0; MAX_ARCHIVE]).unwrap();
        let error = step(dir.path(), "/srv").unwrap_err().to_string();
        assert!(error.contains("--run step"), "{error}");
        assert!(matches!(step(Path::new("/nonexistent"), "/x"), Err(CopyError::Pack(_))));
    }
}
