//! Sandboxes as the command line needs them, and how a user's short name becomes an id.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::client::{Client, ClientError, encode};

/// Pages read before the service is taken to be running in circles.
const MAX_PAGES: usize = 1000;
/// Length of a whole id.
const ID_LENGTH: usize = 20;
/// Sandboxes named in a message about an ambiguous name.
const MAX_NAMED: usize = 5;

/// The fields of a sandbox that are shown; the API may send more.
#[derive(Debug, Clone, Deserialize)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// Its template.
    #[serde(default)]
    pub template: String,
    /// `running`, `paused`, ...
    #[serde(default)]
    pub state: String,
    /// Where its machine came from.
    #[serde(default)]
    pub origin: String,
    /// The user's labels; `name` is one that commands take instead of the id.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// RFC 3339.
    #[serde(default)]
    pub created_at: String,
    /// RFC 3339.
    #[serde(default)]
    pub expires_at: String,
    /// VMM that runs it.
    #[serde(default)]
    pub vmm: String,
    /// Phases of the request that made it.
    #[serde(default)]
    pub timings_ms: BTreeMap<String, f64>,
}

/// A name that fits no sandbox, or several.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// Asking failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// It cannot be the beginning of an id, and no sandbox has it for a name.
    #[error("no sandbox is named {0:?} or has an id that begins so; `rethaw ls` shows them")]
    Unknown(String),
    /// Several fit.
    #[error("{name:?} fits {count} sandboxes: {ids}; give more of the id")]
    Ambiguous {
        /// As typed.
        name: String,
        /// How many.
        count: usize,
        /// The first few of them.
        ids: String,
    },
}

/// All items of a list, page after page, as JSON.
pub async fn list_values(client: &Client, path: &str) -> Result<Vec<Value>, ClientError> {
    #[derive(Deserialize)]
    struct Page {
        items: Vec<Value>,
        #[serde(default)]
        next_token: Option<String>,
    }
    let mut items = Vec::new();
    let mut target = path.to_owned();
    for _ in 0..MAX_PAGES {
        let page: Page = client.get(&target).await?;
        items.extend(page.items);
        match page.next_token.filter(|token| !token.is_empty()) {
            Some(token) => target = format!("{path}?next_token={}", encode(&token)),
            None => return Ok(items),
        }
    }
    Err(client.unexpected(&format!("{path} has more than {MAX_PAGES} pages")))
}

/// All sandboxes.
pub async fn list(client: &Client) -> Result<Vec<Sandbox>, ClientError> {
    let values = list_values(client, "/v1/sandboxes").await?;
    let parse = |v| serde_json::from_value(v).map_err(|e| client.unexpected(&e.to_string()));
    values.into_iter().map(parse).collect()
}

/// The id a user means: an id, the beginning of one, or a name given with `run --name`.
pub async fn resolve(client: &Client, name: &str) -> Result<String, ResolveError> {
    if name.len() == ID_LENGTH && is_id_part(name) {
        return Ok(name.to_owned());
    }
    choose(name, &list(client).await?)
}

/// As [`resolve`], for several names with one look at the list.
pub async fn resolve_all(client: &Client, names: &[String]) -> Result<Vec<String>, ResolveError> {
    if names.iter().all(|name| name.len() == ID_LENGTH && is_id_part(name)) {
        return Ok(names.to_vec());
    }
    let all = list(client).await?;
    names.iter().map(|name| choose(name, &all)).collect()
}

fn is_id_part(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

fn choose(name: &str, all: &[Sandbox]) -> Result<String, ResolveError> {
    // A whole id or a name given on purpose beats the beginning of some id.
    let exact = |s: &&Sandbox| s.id == name || s.metadata.get("name").is_some_and(|n| n == name);
    let mut found: Vec<&Sandbox> = all.iter().filter(exact).collect();
    if found.is_empty() && is_id_part(name) {
        found = all.iter().filter(|s| s.id.starts_with(name)).collect();
    }
    match found.as_slice() {
        [one] => Ok(one.id.clone()),
        [] => Err(ResolveError::Unknown(name.to_owned())),
        several => {
            let ids: Vec<&str> = several.iter().take(MAX_NAMED).map(|s| s.id.as_str()).collect();
            let more = if several.len() > MAX_NAMED { ", ..." } else { "" };
            Err(ResolveError::Ambiguous {
                name: name.to_owned(),
                count: several.len(),
                ids: format!("{}{more}", ids.join(", ")),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandboxes() -> Vec<Sandbox> {
        let make = |id: &str, name: &str| {
            let mut value = serde_json::json!({"id": id});
            if !name.is_empty() {
                value["metadata"] = serde_json::json!({"name": name});
            }
            serde_json::from_value(value).unwrap()
        };
        vec![
            make("abc00000000000000000", ""),
            make("abd00000000000000000", "web"),
            make("xyz00000000000000000", "ab"),
        ]
    }

    #[test]
    fn short_ids_and_names_are_found() {
        let all = sandboxes();
        assert_eq!(choose("abc", &all).unwrap(), "abc00000000000000000");
        assert_eq!(choose("web", &all).unwrap(), "abd00000000000000000");
        assert_eq!(choose("ab", &all).unwrap(), "xyz00000000000000000", "a name beats a prefix");
    }

    #[test]
    fn nothing_is_guessed() {
        let all = sandboxes();
        let message = choose("a", &all).unwrap_err().to_string();
        assert!(
            message.contains("fits 2 sandboxes: abc0") && message.contains("abd0"),
            "{message}"
        );
        assert!(matches!(choose("q", &all), Err(ResolveError::Unknown(_))));
        assert!(matches!(choose("", &all), Err(ResolveError::Unknown(_))), "empty is not all");
        assert!(matches!(choose("ABC", &all), Err(ResolveError::Unknown(_))));
    }
}
