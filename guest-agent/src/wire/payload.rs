//! Bytes inside JSON: base64 always for what comes in, text where it is text for what goes out.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes that travel as a base64 string.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Base64(pub Vec<u8>);

/// The bytes may be key material: only the length is shown.
impl std::fmt::Debug for Base64 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Base64({} bytes)", self.0.len())
    }
}

impl From<Vec<u8>> for Base64 {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl Serialize for Base64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        STANDARD.decode(text.as_bytes()).map(Self).map_err(D::Error::custom)
    }
}

/// How a [`Chunk`]'s bytes are written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Encoding {
    /// `data` is the text itself.
    #[default]
    Utf8,
    /// `data` is base64.
    Base64,
}

/// A piece of a command's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Chunk {
    /// The bytes, as `encoding` says.
    pub data: String,
    /// How `data` is to be read.
    #[serde(default)]
    pub encoding: Encoding,
}

impl Chunk {
    /// Text where the bytes are UTF-8 without NUL, base64 otherwise.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) if !bytes.contains(&0) => {
                Self { data: text.to_owned(), encoding: Encoding::Utf8 }
            }
            _ => Self { data: STANDARD.encode(bytes), encoding: Encoding::Base64 },
        }
    }

    /// The bytes; `None` when `data` is not the base64 it claims to be.
    pub fn into_bytes(self) -> Option<Vec<u8>> {
        match self.encoding {
            Encoding::Utf8 => Some(self.data.into_bytes()),
            Encoding::Base64 => STANDARD.decode(self.data).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_keeps_any_bytes() {
        for bytes in [&b"plain"[..], "grüße".as_bytes(), &[0xff, 0xfe, 0], b"", b"nul\0"] {
            let chunk = Chunk::from_bytes(bytes);
            let json = serde_json::to_string(&chunk).unwrap();
            let back: Chunk = serde_json::from_str(&json).unwrap();
            assert_eq!(back.into_bytes().unwrap(), bytes);
        }
        assert_eq!(Chunk::from_bytes(b"plain").encoding, Encoding::Utf8);
        assert_eq!(Chunk::from_bytes(&[0xff]).encoding, Encoding::Base64);
    }

    #[test]
    fn entropy_is_not_printed() {
        assert_eq!(format!("{:?}", Base64(vec![7; 64])), "Base64(64 bytes)");
    }
}
