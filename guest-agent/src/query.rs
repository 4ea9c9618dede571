//! Query strings: `path=%2Froot%2Fa&mode=600`.

use crate::server::ApiError;
use crate::wire::codes;

/// The decoded value of the first `name`.
///
/// # Errors
/// 400 when it is not percent-encoded UTF-8.
pub fn get(query: &str, name: &str) -> Result<Option<String>, ApiError> {
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let Some((_, value)) = { pairs }.find(|(key, _)| *key == name) else { return Ok(None) };
    decode(value).map(Some).ok_or_else(|| {
        let text = format!("{name}={value} is not percent-encoded UTF-8");
        ApiError::new(400, codes::INVALID_REQUEST, text)
    })
}

fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digit = |b: u8| char::from(b).to_digit(16);
                (digit(bytes.next()?)? * 16 + digit(bytes.next()?)?) as u8
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes() {
        let query = "a=1&path=%2Froot%2Fgr%C3%BC+n&flag&bad=%zz";
        assert_eq!(get(query, "path").unwrap().unwrap(), "/root/grü n");
        assert_eq!(get(query, "flag").unwrap().unwrap(), "");
        assert_eq!(get(query, "none").unwrap(), None);
        assert!(get(query, "bad").is_err());
    }
}
