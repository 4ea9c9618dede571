//! One side of a copy, as typed.

use std::path::PathBuf;
use std::str::FromStr;

/// Where something is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// `-`.
    Standard,
    /// On this host.
    Local(PathBuf),
    /// In a sandbox.
    Remote {
        /// Id, the beginning of one, or a name.
        sandbox: String,
        /// Absolute.
        path: String,
    },
}

/// What was typed is not a place.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlaceError {
    /// Nothing at all.
    #[error("an empty path is no file")]
    Empty,
    /// A sandbox has no working folder that a path could start from.
    #[error("{0:?}: the path in a sandbox must be absolute, as in {1}:/tmp/file")]
    Relative(String, String),
}

impl FromStr for Place {
    type Err = PlaceError;

    fn from_str(text: &str) -> Result<Self, PlaceError> {
        if text.is_empty() {
            return Err(PlaceError::Empty);
        }
        if text == "-" {
            return Ok(Self::Standard);
        }
        match text.split_once(':') {
            // `./a:b` and `/a:b` are local files with a colon in their names.
            Some((sandbox, path)) if !sandbox.is_empty() && !sandbox.contains(['/', '.']) => {
                if !path.starts_with('/') {
                    return Err(PlaceError::Relative(text.to_owned(), sandbox.to_owned()));
                }
                Ok(Self::Remote { sandbox: sandbox.to_owned(), path: path.to_owned() })
            }
            _ => Ok(Self::Local(text.into())),
        }
    }
}

/// The last part of a path in a sandbox; `None` where it has no name of its own to give.
pub fn remote_name(path: &str) -> Option<&str> {
    let name = path.trim_end_matches('/').rsplit('/').next()?;
    (!name.is_empty() && name != "." && name != "..").then_some(name)
}

/// A path without what only says how it is meant: the service refuses `.` in a path, and takes one
/// that ends with a slash for a folder.
pub fn remote_plain(mut path: &str) -> &str {
    while path.len() > 1 {
        match path.strip_suffix("/.").or_else(|| path.strip_suffix('/')) {
            Some("") | None => break,
            Some(shorter) => path = shorter,
        }
    }
    if path == "/." { "/" } else { path }
}

/// `dir/name` in a sandbox.
pub fn remote_join(dir: &str, name: &str) -> String {
    format!("{}/{name}", remote_plain(dir).trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let remote = |sandbox: &str, path: &str| {
            Ok(Place::Remote { sandbox: sandbox.to_owned(), path: path.to_owned() })
        };
        assert_eq!("3kx:/a:b".parse(), remote("3kx", "/a:b"));
        assert_eq!("-".parse(), Ok(Place::Standard));
        for local in ["a", "./a:b", "/a:b", ":/a", "../x:/y", "a.b:/c"] {
            assert_eq!(local.parse(), Ok(Place::Local(local.into())), "{local}");
        }
        let relative = "3kx:tmp".parse::<Place>().unwrap_err();
        assert!(relative.to_string().ends_with("3kx:/tmp/file"), "{relative}");
        assert_eq!("".parse::<Place>(), Err(PlaceError::Empty));
    }

    #[test]
    fn names_of_remote_paths() {
        assert_eq!(remote_name("/a/b"), Some("b"));
        assert_eq!(remote_name("/a/b/"), Some("b"));
        for nameless in ["/", "/a/.", "/a/..", "//"] {
            assert_eq!(remote_name(nameless), None, "{nameless}");
        }
        for (path, plain) in [
            ("/a/b/.", "/a/b"),
            ("/a/b//", "/a/b"),
            ("/a/./", "/a"),
            ("/.", "/"),
            ("/", "/"),
            ("/.hidden", "/.hidden"),
            ("/a/..", "/a/.."),
        ] {
            assert_eq!(remote_plain(path), plain);
        }
        assert_eq!(remote_join("/", "x"), "/x");
        assert_eq!(remote_join("/a/", "x"), "/a/x");
        assert_eq!(remote_join("/a/.", "x"), "/a/x");
    }
}
