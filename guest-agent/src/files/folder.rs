//! Folders and single entries: `GET /dir`, `POST /dir`, `POST /move`, `GET /stat`.

use super::write::Ownership;
use super::{AbsolutePath, list};
use crate::query;
use crate::server::{Answer, ApiError, json};
use crate::users::User;
use crate::wire::{DirEntries, DirEntry, EntryKind, MkdirRequest, MoveRequest, codes};
use std::fs;
use std::io;
use std::path::Path;

/// Entries one answer lists at most; a listing is held in memory.
const MAX_ENTRIES: usize = 50_000;
const MAX_DEPTH: u32 = 64;

/// `GET /stat?path=`: one entry, a link not followed.
///
/// # Errors
/// 404.
pub fn stat(query: &str) -> Answer {
    let path = AbsolutePath::from_query(query, "path")?;
    json(&list::entry(path.as_path()).map_err(|e| path.error(&e))?)
}

/// `GET /dir?path=&depth=`: what is in a folder, by path; `depth` levels down, 1 when absent.
///
/// # Errors
/// 404, 409 for what is no folder, 413 when there is more than one answer can hold.
pub fn read(query: &str) -> Answer {
    let path = AbsolutePath::from_query(query, "path")?;
    let depth = query::get(query, "depth")?.unwrap_or_else(|| "1".to_owned());
    let depth = depth.parse().ok().filter(|d| (1..=MAX_DEPTH).contains(d)).ok_or_else(|| {
        let text = format!("depth={depth} is not between 1 and {MAX_DEPTH}");
        ApiError::new(400, codes::INVALID_REQUEST, text)
    })?;
    let mut items = Vec::new();
    walk(path.as_path(), depth, &mut items).map_err(|e| path.error(&e))?;
    if items.len() > MAX_ENTRIES {
        let text = format!("{path} has more than {MAX_ENTRIES} entries {depth} levels down");
        return Err(ApiError::new(413, codes::BODY_TOO_LARGE, text));
    }
    items.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    json(&DirEntries { items })
}

fn walk(dir: &Path, depth: u32, items: &mut Vec<DirEntry>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        // Entries may vanish while they are listed.
        let Ok(entry) = list::entry(&path) else { continue };
        let below = depth > 1 && entry.kind == EntryKind::Directory;
        items.push(entry);
        if items.len() > MAX_ENTRIES {
            return Ok(());
        }
        if below {
            match walk(&path, depth - 1, items) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result?,
            }
        }
    }
    Ok(())
}

fn owner(user: Option<&str>) -> Result<Ownership, ApiError> {
    let user: Option<User> = user.map(super::write::find).transpose()?;
    Ok(Ownership { user, mode: None })
}

/// `POST /dir`: makes a folder and its parents.
///
/// # Errors
/// 409 `already_exists` when it is there.
pub fn make(request: &MkdirRequest) -> Answer {
    let path = AbsolutePath::new(&request.path)?;
    let owner = owner(request.user.as_deref())?;
    if fs::symlink_metadata(path.as_path()).is_ok() {
        let text = format!("{path} is there already");
        return Err(ApiError::new(409, codes::ALREADY_EXISTS, text));
    }
    owner.make_parents(path.as_path()).map_err(|e| path.error(&e))?;
    json(&list::entry(path.as_path()).map_err(|e| path.error(&e))?)
}

/// `POST /move`: moves a file or folder, making the target's parents.
///
/// # Errors
/// 404 when it is not there, 409 when the target is a folder that is not empty.
pub fn rename(request: &MoveRequest) -> Answer {
    let (from, to) = (AbsolutePath::new(&request.from)?, AbsolutePath::new(&request.to)?);
    let owner = owner(request.user.as_deref())?;
    fs::symlink_metadata(from.as_path()).map_err(|e| from.error(&e))?;
    if to.as_path().starts_with(from.as_path()) && to != from {
        let text = format!("{from} cannot be moved into itself, to {to}");
        return Err(ApiError::new(400, codes::INVALID_PATH, text));
    }
    let parent = to.as_path().parent().unwrap_or(Path::new("/"));
    owner.make_parents(parent).map_err(|e| to.error(&e))?;
    fs::rename(from.as_path(), to.as_path()).map_err(|e| to.error(&e))?;
    json(&list::entry(to.as_path()).map_err(|e| to.error(&e))?)
}
