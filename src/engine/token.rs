//! Access tokens of sandboxes: a keyed digest (HMAC-SHA256) of a random nonce.
//!
//! The database holds the nonce and a digest of the token, never the token. Whoever has the key,
//! which is in a file of its own, can say the token again: that is what lets a client that connects
//! to a running sandbox share it with the one that made it, and what a signed URL is checked with.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use hmac::{Hmac, Mac};
use rand::RngCore;
use sha2::{Digest, Sha256};

/// File of the key, in the data directory.
pub const FILE: &str = "token-key";

/// What every token starts with.
const PREFIX: &str = "sbx_";

/// The key of all tokens.
#[derive(Clone)]
pub struct TokenKey([u8; 32]);

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenKey(..)")
    }
}

/// A token and what is stored of it.
#[derive(Clone)]
pub struct AccessToken {
    /// The token itself.
    pub secret: String,
    /// What the key makes it from.
    pub nonce: String,
}

impl std::fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AccessToken(..)")
    }
}

impl AccessToken {
    /// A secret that opens nothing, of the usual length.
    pub fn of_nobody() -> String {
        let mut bytes = [0_u8; 32];
        rand::rng().fill_bytes(&mut bytes);
        format!("{PREFIX}{}", hex::encode(bytes))
    }

    /// Its digest, as it is stored.
    pub fn sha256(&self) -> String {
        hex::encode(Sha256::digest(self.secret.as_bytes()))
    }
}

impl TokenKey {
    /// Reads the key file, or makes it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut key = [0_u8; 32];
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let wrong = |_| {
                    let text = "is not 64 hex digits; without it every token has to be made anew";
                    io::Error::new(io::ErrorKind::InvalidData, text)
                };
                hex::decode_to_slice(text.trim(), &mut key).map_err(wrong)?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                rand::rng().fill_bytes(&mut key);
                let draft = path.with_extension("draft");
                let mut options = std::fs::OpenOptions::new();
                let mut file =
                    options.write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
                io::Write::write_all(&mut file, hex::encode(key).as_bytes())?;
                file.sync_all()?;
                std::fs::rename(&draft, path)?;
            }
            Err(e) => return Err(e),
        }
        Ok(Self(key))
    }

    /// A new token.
    pub fn issue(&self) -> AccessToken {
        let mut nonce = [0_u8; 16];
        rand::rng().fill_bytes(&mut nonce);
        let nonce = hex::encode(nonce);
        AccessToken { secret: self.secret(&nonce), nonce }
    }

    /// The token that was made from this nonce; `None` for a sandbox from before there were any.
    pub fn again(&self, nonce: &str) -> Option<AccessToken> {
        let nonce = Some(nonce).filter(|nonce| !nonce.is_empty())?;
        Some(AccessToken { secret: self.secret(nonce), nonce: nonce.to_owned() })
    }

    fn secret(&self, nonce: &str) -> String {
        // A short key is filled up with zeros to a block: RFC 2104.
        let mut block = [0_u8; 64];
        block[..self.0.len()].copy_from_slice(&self.0);
        let digest = Hmac::<Sha256>::new((&block).into()).chain_update(nonce).finalize();
        format!("{PREFIX}{}", hex::encode(digest.into_bytes()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    #[test]
    fn a_token_can_be_said_again_with_the_key_only() {
        let dir = tempfile::tempdir().unwrap();
        let key = TokenKey::open(&dir.path().join(FILE)).unwrap();
        let token = key.issue();
        assert_ne!(token.secret, key.issue().secret);
        let same = TokenKey::open(&dir.path().join(FILE)).unwrap();
        assert_eq!(same.again(&token.nonce).unwrap().secret, token.secret);
        let other = TokenKey::open(&dir.path().join("other")).unwrap();
        assert_ne!(other.again(&token.nonce).unwrap().secret, token.secret);
        assert!(key.again("").is_none());
    }

    #[test]
    fn a_damaged_key_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        std::fs::write(&path, "short").unwrap();
        assert!(TokenKey::open(&path).is_err());
    }
}
