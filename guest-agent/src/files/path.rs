//! Paths from outside: absolute, without `.` and `..`.

use crate::query;
use crate::server::ApiError;
use crate::wire::codes;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A path that says plainly where it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AbsolutePath(PathBuf);

impl AbsolutePath {
    /// Checks a path.
    ///
    /// # Errors
    /// 400 `invalid_path`.
    pub fn new(text: &str) -> Result<Self, ApiError> {
        let why = if text.is_empty() {
            "is missing"
        } else if !text.starts_with('/') {
            "is not absolute"
        } else if text.contains('\0') {
            "holds a NUL byte"
        } else if text.split('/').any(|part| part == "." || part == "..") {
            "holds . or .."
        } else if text.len() > libc::PATH_MAX as usize - 1 {
            "is too long"
        } else {
            return Ok(Self(PathBuf::from(text)));
        };
        Err(ApiError::new(400, codes::INVALID_PATH, format!("path {text:?} {why}")))
    }

    /// The path in a query's parameter.
    ///
    /// # Errors
    /// 400 `invalid_path`.
    pub fn from_query(query: &str, name: &str) -> Result<Self, ApiError> {
        Self::new(&query::get(query, name)?.unwrap_or_default())
    }

    /// The path.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// What an error on it means to the caller.
    pub fn error(&self, error: &io::Error) -> ApiError {
        ApiError::from_io(error, &self.to_string())
    }
}

impl fmt::Display for AbsolutePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_absolute_paths() {
        for good in ["/", "/a", "/a/b.c", "/a//b", "/..a/b..", "/a/"] {
            assert!(AbsolutePath::new(good).is_ok(), "{good}");
        }
        let long = format!("/{}", "a".repeat(5000));
        for bad in ["", "a", "./a", "/a/../b", "/..", "/a/.", "/a\0b", &long] {
            let error = AbsolutePath::new(bad).unwrap_err();
            assert_eq!((error.status, error.error_code), (400, "invalid_path"), "{bad}");
        }
    }
}
