//! Files in the guest, as raw bytes: `GET`, `PUT` and `DELETE /files?path=`.

mod list;
mod path;
mod write;

pub use path::AbsolutePath;
pub use write::put;

use crate::query;
use crate::server::{Answer, ApiError, Body, no_content};
use crate::wire::codes;
use hyper::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use hyper::http::{HeaderValue, Response};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;

/// `GET /files?path=`: the contents, streamed.
///
/// # Errors
/// 404 when it is not there, 409 when it is no regular file.
pub fn get(query: &str) -> Answer {
    let path = AbsolutePath::from_query(query, "path")?;
    // A pipe without a writer must not hold up the agent.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path.as_path())
        .map_err(|e| path.error(&e))?;
    let meta = file.metadata().map_err(|e| path.error(&e))?;
    if meta.is_dir() {
        return Err(ApiError::new(409, codes::IS_A_DIRECTORY, format!("{path} is a folder")));
    }
    if !meta.is_file() {
        let text = format!("{path} is no regular file");
        return Err(ApiError::new(409, codes::NOT_A_FILE, text));
    }
    let length = meta.len();
    let mut response = Response::new(Body::File { file, left: length });
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, length.into());
    Ok(response)
}

/// `DELETE /files?path=`: a file, a link, or with `recursive=true` a folder and all in it.
///
/// # Errors
/// 404 when it is not there, 409 when it is a folder that is not empty.
pub fn delete(query: &str) -> Answer {
    let path = AbsolutePath::from_query(query, "path")?;
    let recursive = query::get(query, "recursive")?.is_some_and(|v| v != "false");
    let meta = fs::symlink_metadata(path.as_path()).map_err(|e| path.error(&e))?;
    let result = match (meta.is_dir(), recursive) {
        (true, true) => fs::remove_dir_all(path.as_path()),
        (true, false) => fs::remove_dir(path.as_path()),
        (false, _) => fs::remove_file(path.as_path()),
    };
    result.map_err(|e| path.error(&e))?;
    no_content()
}
