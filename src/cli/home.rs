//! Where rethaw keeps its files, and the API key among them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Name of the key file in the home folder.
pub const KEY_FILE: &str = "api-key";

/// There is no folder to use.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// Neither variable is set.
    #[error("no home folder: set RETHAW_HOME (neither XDG_DATA_HOME nor HOME is set)")]
    NoFolder,
}

/// The home folder when neither a flag nor `RETHAW_HOME` names one: `/var/lib/rethaw` for root,
/// else `$XDG_DATA_HOME/rethaw`.
pub fn default_home() -> Result<PathBuf, HomeError> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    home_for(nix::unistd::geteuid().is_root(), set("XDG_DATA_HOME"), set("HOME"))
}

/// The key that `rethaw serve` left in `home`, if this user may read it.
pub fn read_key(home: &Path) -> Option<String> {
    let text = std::fs::read_to_string(home.join(KEY_FILE)).ok()?;
    let key = text.trim();
    (!key.is_empty()).then(|| key.to_owned())
}

fn home_for(
    root: bool,
    xdg_data_home: Option<OsString>,
    user_home: Option<OsString>,
) -> Result<PathBuf, HomeError> {
    if root {
        return Ok(PathBuf::from("/var/lib/rethaw"));
    }
    let data = xdg_data_home
        .map(PathBuf::from)
        .or_else(|| user_home.map(|home| PathBuf::from(home).join(".local/share")))
        .ok_or(HomeError::NoFolder)?;
    Ok(data.join("rethaw"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_follows_the_user() {
        let root = home_for(true, Some("/x".into()), Some("/root".into())).unwrap();
        assert_eq!(root, Path::new("/var/lib/rethaw"));
        let xdg = home_for(false, Some("/x".into()), Some("/home/u".into())).unwrap();
        assert_eq!(xdg, Path::new("/x/rethaw"));
        let plain = home_for(false, None, Some("/home/u".into())).unwrap();
        assert_eq!(plain, Path::new("/home/u/.local/share/rethaw"));
        assert!(home_for(false, None, None).is_err());
    }

    #[test]
    fn key_is_trimmed_and_an_empty_file_is_no_key() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_key(dir.path()), None);
        std::fs::write(dir.path().join(KEY_FILE), "rk_1\n").unwrap();
        assert_eq!(read_key(dir.path()).as_deref(), Some("rk_1"));
        std::fs::write(dir.path().join(KEY_FILE), "\n").unwrap();
        assert_eq!(read_key(dir.path()), None);
    }
}
