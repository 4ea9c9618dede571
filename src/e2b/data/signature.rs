//! Signed URLs: `/files?path=&signature=v1_...` opens one file to whoever has the URL, for as long
//! as the URL says. The signature is a digest over path, operation, user and the sandbox's token.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use super::files::FilesQuery;

/// What a URL is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Download.
    Read,
    /// Upload.
    Write,
}

impl Operation {
    fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// Whether the URL's signature was made with this token and its time is not up.
pub fn fits(query: &FilesQuery, operation: Operation, token: &str) -> bool {
    let Some(given) = &query.signature else { return false };
    let now = OffsetDateTime::now_utc().unix_timestamp();
    if query.signature_expiration.is_some_and(|until| until < now) {
        return false;
    }
    let wanted = signature(query, operation, token);
    // Digests, so that the time the comparison takes says nothing about what would be right.
    Sha256::digest(given.as_bytes()) == Sha256::digest(wanted.as_bytes())
}

fn signature(query: &FilesQuery, operation: Operation, token: &str) -> String {
    let (path, user) = (query.path.as_deref(), query.username.as_deref());
    let (path, user) = (path.unwrap_or_default(), user.unwrap_or_default());
    let mut text = format!("{path}:{}:{user}:{token}", operation.as_str());
    if let Some(until) = query.signature_expiration {
        text.push_str(&format!(":{until}"));
    }
    format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_for_one_path_one_operation_and_a_time() {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let mut query = FilesQuery {
            path: Some("/a b".to_owned()),
            username: None,
            signature: None,
            signature_expiration: Some(now + 60),
        };
        query.signature = Some(signature(&query, Operation::Read, "sbx_1"));
        assert!(fits(&query, Operation::Read, "sbx_1"));
        assert!(!fits(&query, Operation::Write, "sbx_1"));
        assert!(!fits(&query, Operation::Read, "sbx_2"));
        query.signature_expiration = Some(now + 61);
        assert!(!fits(&query, Operation::Read, "sbx_1"), "the time is signed, too");
        query.signature_expiration = Some(now - 1);
        query.signature = Some(signature(&query, Operation::Read, "sbx_1"));
        assert!(!fits(&query, Operation::Read, "sbx_1"), "its time is up");
    }

    #[test]
    fn it_is_what_the_sdks_make() {
        let query = FilesQuery { path: Some("/etc/passwd".to_owned()), ..FilesQuery::default() };
        // python: base64(sha256(b"/etc/passwd:read::token")) without its padding
        assert_eq!(
            signature(&query, Operation::Read, "token"),
            "v1_C+oYJCob+Sy32TyBMR/AvVS0mzXnA5LaPK3obHSj9sY"
        );
    }
}
