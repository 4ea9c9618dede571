//! `PUT /files?path=&user=&mode=`: written beside the target, then renamed over it, so that a
//! reader sees the old file or the new one and a broken upload leaves nothing.

use super::{AbsolutePath, metadata};
use crate::query;
use crate::server::{Answer, ApiError, json};
use crate::users::{self, User};
use crate::wire::codes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::http::HeaderMap;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

/// Start of the name that a file has while it is being uploaded.
pub const UPLOAD_PREFIX: &str = ".rethaw-upload-";

/// Who owns what is made, and with which permissions.
#[derive(Debug, Clone)]
pub struct Ownership {
    /// Owner of new files and folders; unchanged when absent.
    pub user: Option<User>,
    /// Permission bits, when the caller wants certain ones.
    pub mode: Option<u32>,
}

impl Ownership {
    /// From `user=` and `mode=` (octal).
    ///
    /// # Errors
    /// 422 for an unknown user, 400 for a mode that is none.
    pub fn from_query(query: &str) -> Result<Self, ApiError> {
        let user = query::get(query, "user")?.filter(|u| !u.is_empty());
        let mode = query::get(query, "mode")?.filter(|m| !m.is_empty());
        let mode = mode
            .map(|text| match u32::from_str_radix(&text, 8) {
                Ok(mode) if mode <= 0o7777 => Ok(mode),
                _ => {
                    let text = format!("mode={text} is no octal mode");
                    Err(ApiError::new(400, codes::INVALID_REQUEST, text))
                }
            })
            .transpose()?;
        Ok(Self { user: user.map(|u| find(&u)).transpose()?, mode })
    }

    /// Makes a folder and its parents.
    ///
    /// # Errors
    /// As for any file.
    pub fn make_parents(&self, dir: &Path) -> io::Result<()> {
        let mut missing: Vec<PathBuf> = Vec::new();
        let mut at = dir;
        loop {
            match fs::metadata(at) {
                Ok(meta) if meta.is_dir() => break,
                Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    missing.push(at.to_owned());
                    at = at.parent().ok_or(io::ErrorKind::NotFound)?;
                }
                Err(error) => return Err(error),
            }
        }
        for dir in missing.iter().rev() {
            match DirBuilder::new().mode(0o755).create(dir) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                result => result?,
            }
            self.give(dir)?;
        }
        Ok(())
    }

    /// Hands `path` to the user.
    ///
    /// # Errors
    /// Not permitted by the file system.
    pub fn give(&self, path: &Path) -> io::Result<()> {
        self.user.as_ref().map_or(Ok(()), |u| chown(path, Some(u.uid), Some(u.gid)))
    }
}

/// Finds a user of the guest.
///
/// # Errors
/// 422 `user_not_found`.
pub fn find(name: &str) -> Result<User, ApiError> {
    users::find_user(Path::new("/"), name)?.ok_or_else(|| {
        ApiError::new(422, codes::USER_NOT_FOUND, format!("there is no user {name:?}"))
    })
}

/// A file that is being written; it vanishes unless it is kept.
#[derive(Debug)]
pub struct Upload {
    file: File,
    temporary: PathBuf,
    kept: bool,
}

impl Upload {
    /// A new file beside `target`.
    ///
    /// # Errors
    /// As for any file.
    pub fn beside(target: &Path) -> io::Result<Self> {
        let mut random = [0u8; 8];
        crate::random::fill(&mut random)?;
        let name = format!("{UPLOAD_PREFIX}{}", hex::encode(random));
        let temporary = target.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        Ok(Self { file, temporary, kept: false })
    }

    /// Appends.
    ///
    /// # Errors
    /// The disk is full, or fails.
    pub fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.file.write_all(data)
    }

    /// Notes down what the uploader says about it.
    ///
    /// # Errors
    /// The file system keeps no such notes, or not as many.
    pub fn note(&self, metadata: &BTreeMap<String, String>) -> io::Result<()> {
        metadata::write(&self.file, metadata)
    }

    /// Puts it in the target's place.
    ///
    /// # Errors
    /// The target is a folder, or not writable.
    pub fn keep(mut self, target: &Path, ownership: &Ownership) -> io::Result<()> {
        let old = fs::metadata(target).ok();
        if old.as_ref().is_some_and(fs::Metadata::is_dir) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let mode = ownership.mode.or(old.as_ref().map(|m| m.mode() & 0o7777)).unwrap_or(0o644);
        // The owner first: changing it clears set-user-id bits.
        match (&ownership.user, &old) {
            (Some(user), _) => chown(&self.temporary, Some(user.uid), Some(user.gid))?,
            (None, Some(old)) => chown(&self.temporary, Some(old.uid()), Some(old.gid()))?,
            (None, None) => {}
        }
        self.file.set_permissions(fs::Permissions::from_mode(mode))?;
        match fs::rename(&self.temporary, target) {
            // Something is mounted on it, as on /etc/hosts in every sandbox: it is what is seen
            // there that has to change. The copy has owner and mode of what is copied.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                fs::copy(&self.temporary, target)?;
                let meta = self.file.metadata()?;
                chown(target, Some(meta.uid()), Some(meta.gid()))
            }
            result => {
                result?;
                self.kept = true;
                Ok(())
            }
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing more can be done about a file that does not go away.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// `PUT /files`.
///
/// # Errors
/// 400 for the path or a body that breaks off, 409 for a folder, 507 when the disk is full.
pub async fn put(query: &str, headers: &HeaderMap, mut body: Incoming) -> Answer {
    let path = AbsolutePath::from_query(query, "path")?;
    let ownership = Ownership::from_query(query)?;
    let metadata = metadata::from_headers(headers)?;
    // A link is followed to what it points at, which is then replaced.
    let target = fs::canonicalize(path.as_path()).unwrap_or_else(|_| path.as_path().to_owned());
    if target.is_dir() || path.to_string().ends_with('/') {
        return Err(ApiError::new(409, codes::IS_A_DIRECTORY, format!("{path} is a folder")));
    }
    let parent = target.parent().unwrap_or(Path::new("/"));
    ownership.make_parents(parent).map_err(|e| path.error(&e))?;
    let mut upload = Upload::beside(&target).map_err(|e| path.error(&e))?;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| {
            ApiError::new(400, codes::INVALID_REQUEST, format!("{path}: the body broke off: {e}"))
        })?;
        if let Ok(data) = frame.into_data() {
            upload.write(&data).map_err(|e| path.error(&e))?;
        }
    }
    upload.note(&metadata).map_err(|e| path.error(&e))?;
    upload.keep(&target, &ownership).map_err(|e| path.error(&e))?;
    json(&super::list::entry(&target).map_err(|e| path.error(&e))?)
}
