//! The sandbox's access token, kept where the sandbox's own programs (as root) can read it.

use crate::agent::Agent;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;

/// Where the token is.
pub const PATH: &str = "/run/rethaw/access-token";

/// Keeps a token; only root can read it.
///
/// # Errors
/// `/run` cannot be written.
pub fn store(agent: &Agent, token: &str) -> io::Result<()> {
    let path = agent.path(PATH);
    let open = || -> io::Result<File> {
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)
    };
    let mut file = match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(agent.path("/run/rethaw"))?;
            open()?
        }
        other => other?,
    };
    file.write_all(token.as_bytes())
}

/// Forgets the token.
///
/// # Errors
/// It is there and cannot be removed.
pub fn drop(agent: &Agent) -> io::Result<()> {
    match fs::remove_file(agent.path(PATH)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
