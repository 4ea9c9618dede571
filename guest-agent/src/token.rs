//! The sandbox's access token, kept where the sandbox's own programs (as root) can read it.

use crate::agent::Agent;
use crate::identity::rewrite;
use std::fs;
use std::io;

/// Where the token is. The file is there before there is a token, and blank.
pub const PATH: &str = "/run/rethaw/access-token";
const NONE: &str = "\n";
/// Only root can read it.
const MODE: u32 = 0o600;

/// Makes the file, without a token: a clone has only to change it.
///
/// # Errors
/// `/run` cannot be written.
pub fn prepare(agent: &Agent) -> io::Result<()> {
    fs::create_dir_all(agent.path("/run/rethaw"))?;
    store(agent, None)
}

/// Keeps a token, or none any more.
///
/// # Errors
/// `/run` cannot be written.
pub fn store(agent: &Agent, token: Option<&str>) -> io::Result<()> {
    let path = agent.path(PATH);
    let token = token.unwrap_or(NONE);
    match rewrite(&path, token, MODE) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(agent.path("/run/rethaw"))?;
            rewrite(&path, token, MODE)
        }
        other => other,
    }
}
