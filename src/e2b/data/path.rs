//! Paths as the SDKs send them: relative ones start at the user's home, `~` is it. The agent takes
//! plain absolute paths only.

use std::time::Duration;

use guest_agent::client::{AgentClient, AgentError};
use guest_agent::wire::{UserInfo, codes};
use hyper::Method;

/// How long the guest may take to look a user up.
const DEADLINE: Duration = Duration::from_secs(10);

/// The absolute path that is meant.
pub async fn resolve(agent: &AgentClient, path: &str, user: &str) -> Result<String, AgentError> {
    if path.starts_with('/') {
        return Ok(plain(path));
    }
    let below = match path.strip_prefix('~') {
        None => path,
        Some(rest) if rest.is_empty() || rest.starts_with('/') => rest,
        Some(_) => {
            return Err(AgentError::Refused {
                status: 400,
                error_code: codes::INVALID_PATH.to_owned(),
                message: format!("path {path:?}: only the user's own home can be written as ~"),
            });
        }
    };
    let query = format!("/user?name={}", encode(user));
    let user: UserInfo = agent.call(Method::GET, &query, None::<&()>, DEADLINE).await?;
    Ok(plain(&format!("{}/{below}", user.home)))
}

/// Without `.`, `..` and doubled slashes, as a shell's `cd -L` would read it.
fn plain(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// A value for the agent's query strings.
pub fn encode(value: &str) -> String {
    let keep = |b: u8| b.is_ascii_alphanumeric() || b"-_.~/".contains(&b);
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        if keep(byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_plain() {
        for (path, wanted) in [
            ("/", "/"),
            ("/a//b/", "/a/b"),
            ("/a/./b/../c", "/a/c"),
            ("/../..", "/"),
            ("/home/user/x y", "/home/user/x y"),
        ] {
            assert_eq!(plain(path), wanted, "{path}");
        }
    }

    #[test]
    fn values_are_encoded() {
        assert_eq!(encode("/a b&c=ü"), "/a%20b%26c%3D%C3%BC");
    }
}
