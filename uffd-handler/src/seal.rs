//! Encryption of what a paused workspace leaves on disk.
//!
//! A workspace has one [`Key`]. Each of its files is encrypted under a key of the file's own:
//! HKDF-SHA-256 of the workspace's key, a random salt that is stored with the file, and the file's
//! purpose. A file is written once and never again, so counting its pages gives nonces that cannot
//! repeat under one key, and AES-256-GCM is safe with them. Its tags make a page that was changed,
//! moved or taken from another file an error, like any other page that cannot be read.
//!
//! Keys go from process to process in memory (a sealed memfd), never by name.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use aes_gcm::aead::AeadInPlace;
use aes_gcm::{Aes256Gcm, KeyInit, Nonce, Tag};
use hkdf::Hkdf;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rand::TryRngCore;
use rand::rngs::OsRng;
use sha2::Sha256;
use thiserror::Error;
use zeroize::Zeroizing;

/// Bytes of a key, and of a salt.
pub const KEY_LEN: usize = 32;
/// Bytes of an authentication tag.
pub const TAG_LEN: usize = 16;

/// Nonces of a file's pages and that of a file encrypted as a whole must differ.
const PAGES: u32 = 0;
const WHOLE: u32 = 1;

/// Why there is no key, or it opens nothing.
#[derive(Debug, Error)]
pub enum SealError {
    /// The system gives no random bytes.
    #[error("no random bytes for a key: {0}")]
    Random(String),
    /// A key could not be put into memory that can be handed on, or not be read from there.
    #[error("handing on a key: {0}")]
    Descriptor(#[from] std::io::Error),
    /// Another key, another purpose, or damage.
    #[error("does not open with its key: damaged, or the key is another one")]
    Wrong,
    /// There is no such key (any more).
    #[error("no key {id}: {reason}")]
    Missing {
        /// Its name.
        id: String,
        /// Why not.
        reason: String,
    },
}

/// A key. Its bytes are wiped when it is dropped, and shown nowhere.
#[derive(Clone)]
pub struct Key(Zeroizing<[u8; KEY_LEN]>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

fn random() -> Result<[u8; KEY_LEN], SealError> {
    let mut bytes = [0; KEY_LEN];
    OsRng.try_fill_bytes(&mut bytes).map_err(|e| SealError::Random(e.to_string()))?;
    Ok(bytes)
}

impl Key {
    /// A new one.
    pub fn generate() -> Result<Self, SealError> {
        random().map(Self::from_bytes)
    }

    /// One that was kept elsewhere.
    pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Its bytes, for whoever wraps it.
    pub fn expose(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// A descriptor that hands it to another process.
    pub fn to_descriptor(&self) -> Result<OwnedFd, SealError> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create("rethaw-key", flags).map_err(std::io::Error::from)?);
        file.write_all_at(&*self.0, 0)?;
        let seals = SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_WRITE
            | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(std::io::Error::from)?;
        Ok(file.into())
    }

    /// The key behind a descriptor.
    pub fn from_descriptor(descriptor: BorrowedFd<'_>) -> Result<Self, SealError> {
        let file = File::from(descriptor.try_clone_to_owned()?);
        let mut bytes = Zeroizing::new([0; KEY_LEN]);
        file.read_exact_at(&mut *bytes, 0)?;
        Ok(Self(bytes))
    }

    /// Encrypts something small as a whole; `purpose` has to be said again to open it.
    pub fn seal(&self, purpose: &str, plain: &[u8]) -> Result<Vec<u8>, SealError> {
        let salt = random()?;
        let mut out = Vec::with_capacity(KEY_LEN + plain.len() + TAG_LEN);
        out.extend_from_slice(&salt);
        out.extend_from_slice(plain);
        let cipher = FileCipher::new(self, &salt, purpose);
        let tag = cipher.encrypt(WHOLE, 0, &mut out[KEY_LEN..])?;
        out.extend_from_slice(&tag);
        Ok(out)
    }

    /// Undoes [`Key::seal`].
    pub fn open(&self, purpose: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (salt, rest) = sealed.split_first_chunk().ok_or(SealError::Wrong)?;
        let (body, tag) = rest.split_last_chunk().ok_or(SealError::Wrong)?;
        let mut plain = Zeroizing::new(body.to_vec());
        let cipher = FileCipher::new(self, salt, purpose);
        cipher.decrypt(WHOLE, 0, &mut plain, tag)?;
        Ok(plain)
    }
}

/// Where keys are found by their names.
pub trait KeySource: Send + Sync + std::fmt::Debug {
    /// The key of that name. May wait for whoever unwraps it.
    fn key(&self, id: &str) -> Result<Key, SealError>;
}

/// Knows no keys: for where nothing is encrypted.
#[derive(Clone, Copy, Debug)]
pub struct NoKeys;

impl KeySource for NoKeys {
    fn key(&self, id: &str) -> Result<Key, SealError> {
        Err(SealError::Missing { id: id.to_owned(), reason: "there are no keys here".to_owned() })
    }
}

/// The cipher of one file.
pub(crate) struct FileCipher(Aes256Gcm);

impl std::fmt::Debug for FileCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FileCipher(..)")
    }
}

impl FileCipher {
    /// A cipher with a new salt; keep the salt, the file is opened with it.
    pub(crate) fn generate(key: &Key, purpose: &str) -> Result<(Self, [u8; KEY_LEN]), SealError> {
        let salt = random()?;
        Ok((Self::new(key, &salt, purpose), salt))
    }

    pub(crate) fn new(key: &Key, salt: &[u8; KEY_LEN], purpose: &str) -> Self {
        let mut own = Zeroizing::new([0; KEY_LEN]);
        let parts = [b"rethaw 1 ".as_slice(), purpose.as_bytes()];
        // Fails for outputs of more than 255 digests only; this is one.
        let _ = Hkdf::<Sha256>::new(Some(salt), &*key.0).expand_multi_info(&parts, &mut *own);
        Self(Aes256Gcm::new((&*own).into()))
    }

    /// Encrypts the page in this place. Once for each place: a nonce must not be used again.
    pub(crate) fn seal_page(
        &self,
        place: u64,
        page: &mut [u8],
    ) -> Result<[u8; TAG_LEN], SealError> {
        self.encrypt(PAGES, place, page)
    }

    /// Decrypts the page in this place; what does not fit its tag is not shown.
    pub(crate) fn open_page(
        &self,
        place: u64,
        page: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), SealError> {
        self.decrypt(PAGES, place, page, tag)
    }

    fn encrypt(&self, kind: u32, n: u64, bytes: &mut [u8]) -> Result<[u8; TAG_LEN], SealError> {
        let tag = self.0.encrypt_in_place_detached(&nonce(kind, n), b"", bytes);
        // Fails beyond 64 GiB only.
        tag.map(Into::into).map_err(|_| SealError::Wrong)
    }

    fn decrypt(
        &self,
        kind: u32,
        n: u64,
        bytes: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), SealError> {
        let done =
            self.0.decrypt_in_place_detached(&nonce(kind, n), b"", bytes, Tag::from_slice(tag));
        done.map_err(|_| SealError::Wrong)
    }
}

fn nonce(kind: u32, n: u64) -> Nonce<aes_gcm::aead::consts::U12> {
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&kind.to_le_bytes());
    nonce[4..].copy_from_slice(&n.to_le_bytes());
    nonce.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_sealed_opens_with_its_key_and_purpose_only() {
        let (key, other) = (Key::generate().unwrap(), Key::generate().unwrap());
        let sealed = key.seal("test", b"a secret").unwrap();
        assert!(!sealed.windows(8).any(|w| w == b"a secret"));
        assert_eq!(&**key.open("test", &sealed).unwrap(), b"a secret");
        assert!(other.open("test", &sealed).is_err());
        assert!(key.open("tests", &sealed).is_err());
        for i in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[i] ^= 1;
            assert!(key.open("test", &bad).is_err(), "byte {i}");
            assert!(key.open("test", &sealed[..i]).is_err(), "cut at {i}");
        }
        assert_ne!(sealed, key.seal("test", b"a secret").unwrap(), "a salt of its own each time");
    }

    #[test]
    fn pages_are_bound_to_their_places_and_files() {
        let key = Key::generate().unwrap();
        let (one, salt) = FileCipher::generate(&key, "pages").unwrap();
        let (two, _) = FileCipher::generate(&key, "pages").unwrap();
        let mut page = [7; 4096];
        let tag = one.seal_page(3, &mut page).unwrap();
        assert_ne!(page, [7; 4096]);
        for wrong in
            [one.open_page(4, &mut page.clone(), &tag), two.open_page(3, &mut page.clone(), &tag)]
        {
            assert!(wrong.is_err());
        }
        FileCipher::new(&key, &salt, "pages").open_page(3, &mut page, &tag).unwrap();
        assert_eq!(page, [7; 4096]);
    }

    #[test]
    fn a_key_travels_as_a_descriptor_and_shows_nothing() {
        let key = Key::generate().unwrap();
        let descriptor = key.to_descriptor().unwrap();
        let there = Key::from_descriptor(descriptor.as_fd()).unwrap();
        assert_eq!(there.expose(), key.expose());
        assert!(File::from(descriptor).write_all_at(b"x", 0).is_err(), "it cannot be changed");
        assert_eq!(format!("{key:?}"), "Key(..)");
    }
}
