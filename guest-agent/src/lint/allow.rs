//! What a template has on purpose: `/etc/rethaw/lint-allow`, one pattern a line, and after it the
//! reason. `*` stands for any characters but `/`, `**` for any at all, `?` for one.
//!
//! ```text
//! # PATTERN            REASON
//! /srv/**/test-*.pem   keys of the test suite, of no use anywhere
//! env:BUILD_TOKEN      revoked when the template was built
//! ```

use super::Findings;
use std::fs;
use std::io;
use std::path::Path;

const LIST: &str = "/etc/rethaw/lint-allow";

/// Patterns and their reasons.
#[derive(Debug, Default)]
pub(super) struct Allowed(Vec<(String, String)>);

impl Allowed {
    /// Reads the list; a line without a reason allows nothing and is a finding.
    ///
    /// # Errors
    /// The list is there and cannot be read.
    pub(super) fn read(root: &Path, findings: &mut Findings) -> io::Result<Self> {
        let text = match fs::read_to_string(root.join(LIST.trim_start_matches('/'))) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            result => result?,
        };
        let mut allowed = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match line.split_once(char::is_whitespace) {
                Some((pattern, reason)) => {
                    allowed.push((pattern.to_owned(), reason.trim().to_owned()));
                }
                None => {
                    let text = format!("line {}: {line} without a reason", number + 1);
                    findings.add(LIST, "lint-allow", text);
                }
            }
        }
        Ok(Self(allowed))
    }

    /// Why `path` is allowed.
    pub(super) fn reason(&self, path: &str) -> Option<String> {
        // The list must not be able to allow its own mistakes.
        let mut fits = self.0.iter().filter(|_| path != LIST);
        let fits = fits.find(|(pattern, _)| matches(pattern.as_bytes(), path.as_bytes()));
        fits.map(|(_, reason)| reason.clone())
    }
}

/// Whether the whole of `text` fits `pattern`. Keeps the places in the pattern it can be at, so
/// that no pattern takes more than its length times the text's.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let mut at = vec![false; pattern.len() + 1];
    at[0] = true;
    skip_stars(pattern, &mut at);
    for byte in text {
        let mut next = vec![false; pattern.len() + 1];
        for (i, _) in at.iter().enumerate().filter(|(_, here)| **here) {
            match pattern.get(i) {
                Some(b'*') => {
                    let any = pattern.get(i + 1) == Some(&b'*')
                        || i.checked_sub(1).and_then(|j| pattern.get(j)) == Some(&b'*');
                    next[i] |= any || *byte != b'/';
                }
                Some(b'?') => next[i + 1] |= *byte != b'/',
                Some(wanted) => next[i + 1] |= wanted == byte,
                None => {}
            }
        }
        skip_stars(pattern, &mut next);
        at = next;
    }
    at[pattern.len()]
}

/// A star may stand for nothing.
fn skip_stars(pattern: &[u8], at: &mut [bool]) {
    for (i, byte) in pattern.iter().enumerate() {
        if *byte == b'*' && at[i] {
            at[i + 1] = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns() {
        let fits = |pattern: &str, text: &str| matches(pattern.as_bytes(), text.as_bytes());
        assert!(fits("/a/b", "/a/b") && !fits("/a/b", "/a/bc") && !fits("/a/b", "/a"));
        assert!(fits("/a/*.pem", "/a/x.pem") && !fits("/a/*.pem", "/a/b/x.pem"));
        assert!(fits("/a/**.pem", "/a/b/x.pem") && fits("/a/**", "/a/b/c"));
        assert!(fits("/a/**/x", "/a/b/c/x") && !fits("/a/**/x", "/a/b/c/y"));
        assert!(fits("/?", "/a") && !fits("/?", "//") && !fits("", "a"));
        assert!(!fits(&"*a".repeat(200), &"a".repeat(100)), "and soon");
    }
}
