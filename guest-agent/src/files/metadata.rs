//! What an uploader notes about a file: `x-metadata-NAME: VALUE` headers, kept as the extended
//! attributes `user.e2b.NAME`, where programs in the guest find them, too.

use crate::server::ApiError;
use crate::wire::codes;
use hyper::http::HeaderMap;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use xattr::FileExt as _;

const HEADER: &str = "x-metadata-";
const ATTRIBUTE: &str = "user.e2b.";

/// What an upload's headers say.
///
/// # Errors
/// 400 for a value that is no text.
pub fn from_headers(headers: &HeaderMap) -> Result<BTreeMap<String, String>, ApiError> {
    let named = headers.iter().filter_map(|(name, value)| {
        Some((name.as_str().strip_prefix(HEADER).filter(|name| !name.is_empty())?, value))
    });
    let text = |(name, value): (&str, &hyper::http::HeaderValue)| {
        let value = value.to_str().map_err(|_| {
            let text = format!("{HEADER}{name}: not ASCII text");
            ApiError::new(400, codes::INVALID_REQUEST, text)
        })?;
        Ok((name.to_owned(), value.to_owned()))
    };
    named.map(text).collect()
}

/// Keeps it with a new file.
pub fn write(file: &File, metadata: &BTreeMap<String, String>) -> io::Result<()> {
    for (name, value) in metadata {
        file.set_xattr(format!("{ATTRIBUTE}{name}"), value.as_bytes())?;
    }
    Ok(())
}

/// What is kept with a file; nothing where the file system keeps no such notes.
pub fn read(path: &Path) -> BTreeMap<String, String> {
    let mut metadata = BTreeMap::new();
    for attribute in xattr::list(path).into_iter().flatten() {
        let name = attribute.to_str().and_then(|name| name.strip_prefix(ATTRIBUTE));
        let (Some(name), Ok(Some(value))) = (name, xattr::get(path, &attribute)) else { continue };
        metadata.insert(name.to_owned(), String::from_utf8_lossy(&value).into_owned());
    }
    metadata
}
