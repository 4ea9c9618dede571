//! Host names of a sandbox's ports: `{port}-{id}.{domain}`.

/// Length of a sandbox id, `[a-z0-9]{20}`.
const ID: usize = 20;

/// Port and sandbox id in the `Host` of a request, or `None` if it does not name a port.
///
/// With a `domain`, what follows the id must be it (names are compared without regard to case, a
/// trailing dot and the listener's own port are ignored); without one, anything may follow, so that
/// a service behind somebody else's wildcard name needs no setting.
pub fn port_and_id<'a>(host: &'a str, domain: Option<&str>) -> Option<(u16, &'a str)> {
    // An IPv6 literal starts with a bracket and has no label with a dash in it.
    let name = host.split_once(':').map_or(host, |(name, _)| name);
    let (label, rest) = name.split_once('.').unwrap_or((name, ""));
    if domain.is_some_and(|domain| !same_name(rest, domain)) {
        return None;
    }
    let (port, id) = label.split_once('-')?;
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    // `parse` would also take a sign.
    if id.len() != ID || !id.bytes().all(fits) || !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some((port.parse().ok().filter(|port| *port != 0)?, id))
}

fn same_name(a: &str, b: &str) -> bool {
    a.trim_end_matches('.').eq_ignore_ascii_case(b.trim_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "0123456789abcdefghij";

    #[test]
    fn a_port_is_found_in_a_name() {
        let host = format!("8080-{NAME}.box.example.com");
        assert_eq!(port_and_id(&host, None), Some((8080, NAME)));
        assert_eq!(port_and_id(&host, Some("box.example.com")), Some((8080, NAME)));
        let host = format!("{host}.:7070");
        assert_eq!(port_and_id(&host, Some(".Box.Example.com")), Some((8080, NAME)));
        let host = format!("49983-{NAME}:7070");
        assert_eq!(port_and_id(&host, None), Some((49983, NAME)));
    }

    #[test]
    fn other_names_are_not_ports() {
        let other = format!("8080-{NAME}.example.com");
        assert_eq!(port_and_id(&other, Some("box.example.com")), None);
        for host in ["localhost", "127.0.0.1:7070", "[::1]:7070", "a-b.example.com", ""] {
            assert_eq!(port_and_id(host, None), None, "{host}");
        }
        for port in ["", "0", "65536", "+80", "-80", "0x50"] {
            assert_eq!(port_and_id(&format!("{port}-{NAME}.x"), None), None, "{port}");
        }
        assert_eq!(port_and_id(&format!("80-{}.x", &NAME[1..]), None), None);
        assert_eq!(port_and_id(&format!("80-{}.x", NAME.to_uppercase()), None), None);
    }
}
