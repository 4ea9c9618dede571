//! What secrets look like.

/// Beginnings of tokens, by who gives them out, and how many more characters have to follow.
const TOKENS: &[(&str, &str, usize)] = &[
    ("AWS access key", "AKIA", 16),
    ("AWS access key", "ASIA", 16),
    ("GitHub token", "ghp_", 30),
    ("GitHub token", "gho_", 30),
    ("GitHub token", "ghs_", 30),
    ("GitHub token", "github_pat_", 30),
    ("GitLab token", "glpat-", 20),
    ("Slack token", "xoxb-", 20),
    ("Slack token", "xoxp-", 20),
    ("Google API key", "AIza", 35),
    ("npm token", "npm_", 36),
    ("PyPI token", "pypi-", 40),
    ("API key", "sk-", 32),
    ("JSON web token", "eyJ", 60),
];
/// Ends of names of variables that hold secrets.
const NAMES: &[&str] = &[
    "TOKEN",
    "SECRET",
    "PASSWORD",
    "PASSWD",
    "API_KEY",
    "APIKEY",
    "ACCESS_KEY",
    "PRIVATE_KEY",
    "SECRET_KEY",
    "CREDENTIALS",
];
/// Shorter values are no secrets, or no good ones.
const MIN_VALUE: usize = 8;

/// Whether `text` holds the beginning of a private key.
pub(super) fn private_key(text: &str) -> bool {
    let mut begins = text.split("-----BEGIN ").skip(1);
    begins.any(|rest| {
        rest.split_once("-----").is_some_and(|(kind, _)| {
            kind.len() < 40 && (kind.ends_with("PRIVATE KEY") || kind == "PGP PRIVATE KEY BLOCK")
        })
    })
}

/// What kind of token is in `text`, if one is.
pub(super) fn token(text: &str) -> Option<&'static str> {
    let long = |rest: &str, length: usize| {
        let legal = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        rest.bytes().take_while(legal).count() >= length
    };
    let found = TOKENS.iter().find(|(_, start, length)| {
        text.match_indices(start).any(|(at, _)| {
            let inside = text[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
            !inside && long(&text[at + start.len()..], *length)
        })
    });
    found.map(|(kind, _, _)| *kind)
}

/// Whether a variable of this name with this value is a secret.
pub(super) fn is_assignment(name: &str, value: &str) -> bool {
    let name = name.to_ascii_uppercase();
    let value = value.trim_matches(['"', '\'']);
    // Values that only name another variable, or a file, give nothing away.
    let plain = !value.starts_with(['$', '/', '<']) && !value.contains(char::is_whitespace);
    value.len() >= MIN_VALUE && plain && NAMES.iter().any(|end| name.ends_with(end))
}

/// What kind of secret a line of a script or a command line holds.
pub(super) fn line(line: &str) -> Option<String> {
    if let Some(kind) = token(line) {
        return Some(kind.to_owned());
    }
    line.split([' ', '\t', ';']).find_map(|word| {
        let (name, value) = word.split_once('=')?;
        let name = name.trim_start_matches('-');
        is_assignment(&name.replace('-', "_"), value).then(|| format!("value of {name}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        assert!(private_key("-----BEGIN PRIVATE KEY-----") && !private_key("PRIVATE KEY"));
        assert!(private_key("a\n-----BEGIN EC PRIVATE KEY-----\n"));
        assert!(!private_key("-----BEGIN PUBLIC KEY-----"));
    }

    #[test]
    fn lines() {
        assert!(line("curl --password=longenough x").is_some());
        assert!(line("export GITHUB_TOKEN=$OTHER_TOKEN").is_none());
        assert!(line("TOKEN=short").is_none());
        assert!(line("task-AKIAIOSFODNN7EXAMPLE").is_some());
        assert!(line("xAKIAIOSFODNN7EXAMPLE").is_none());
        assert_eq!(line("a AKIA1234567890ABCDEF").as_deref(), Some("AWS access key"));
    }
}
