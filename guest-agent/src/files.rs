//! Files in the guest, as raw bytes: `GET`, `PUT` and `DELETE /files?path=`.

pub mod folder;
mod list;
mod metadata;
mod path;
mod tar;
mod write;

pub use list::entry;
pub use path::AbsolutePath;
pub use write::UPLOAD_PREFIX;

use crate::query;
use crate::server::{Answer, ApiError, Body, no_content};
use crate::wire::codes;
use hyper::body::Incoming;
use hyper::http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HeaderName};
use hyper::http::{HeaderMap, HeaderValue, Response};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;

/// Whether a header names the archive type, among others or with parameters.
fn is_tar(headers: &HeaderMap, name: HeaderName) -> bool {
    headers.get(name).is_some_and(|v| v.to_str().is_ok_and(|v| v.contains(tar::CONTENT_TYPE)))
}

/// `PUT /files?path=`: a file's contents, or an archive to unpack into a folder.
///
/// # Errors
/// As [`write::put`] and [`tar::unpack`].
pub async fn put(query: &str, headers: &HeaderMap, body: Incoming) -> Answer {
    if is_tar(headers, CONTENT_TYPE) {
        return tar::unpack(query, body).await;
    }
    write::put(query, headers, body).await
}

/// `GET /files?path=`: a file's contents, streamed; a folder, as an archive when that is accepted.
///
/// # Errors
/// 404 when it is not there, 409 when it is no regular file.
pub fn get(query: &str, headers: &HeaderMap) -> Answer {
    let path = AbsolutePath::from_query(query, "path")?;
    let archive = is_tar(headers, ACCEPT);
    // A pipe without a writer must not hold up the agent.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path.as_path())
        .map_err(|e| path.error(&e))?;
    let meta = file.metadata().map_err(|e| path.error(&e))?;
    if meta.is_dir() && archive {
        let mut response = Response::new(Body::Stream(tar::pack(path.as_path().to_owned())));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(tar::CONTENT_TYPE));
        return Ok(response);
    }
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
