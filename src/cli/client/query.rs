//! Values in paths and queries.

/// Percent-encodes everything but unreserved characters and `/`.
pub fn encode(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                out.push(char::from(byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// As [`encode`], for one part of a path: a slash in a name must not become two parts.
pub fn segment(value: &str) -> String {
    encode(value).replace('/', "%2F")
}

#[cfg(test)]
mod tests {
    use super::{encode, segment};

    #[test]
    fn odd_names_survive_a_url() {
        assert_eq!(encode("/tmp/a b&c=d+e%?#ü"), "/tmp/a%20b%26c%3Dd%2Be%25%3F%23%C3%BC");
        assert_eq!(encode("/plain-1._~"), "/plain-1._~");
        assert_eq!(segment("a/b"), "a%2Fb");
    }
}
