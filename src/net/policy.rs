//! What a sandbox may reach, and how fast: as its user asks for it and as it is kept.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::cidr::Cidr;

/// Longest list of destinations.
pub const MAX_DESTINATIONS: usize = 256;
/// Most ports made public.
pub const MAX_PUBLIC_PORTS: usize = 64;
/// Less than this is no network, only a slow failure.
const MIN_BYTES_PER_SECOND: u64 = 8 << 10;
const MIN_PACKETS_PER_SECOND: u64 = 10;

/// A destination that may be reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Destination {
    /// Every address of a network.
    Network(Cidr),
    /// Whatever addresses this name has, at the time the guest asks for it.
    Name(String),
    /// The same for every name below this one.
    NamesBelow(String),
}

/// What a sandbox may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Internet {
    /// Nothing.
    Off,
    /// Everything but what no sandbox may.
    #[default]
    On,
    /// These, and nothing else.
    Allow(BTreeSet<Destination>),
}

/// Most that passes in a second, counted for each direction by itself
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NetworkLimits)]
pub struct Limits {
    /// Bytes a second; no limit when absent
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 8192)]
    pub bytes_per_second: Option<u64>,
    /// Packets a second; no limit when absent
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 10)]
    pub packets_per_second: Option<u64>,
}

/// All that is set for one sandbox's network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// What it may reach.
    #[serde(default)]
    pub internet: Internet,
    /// How fast.
    #[serde(default)]
    pub limits: Limits,
    /// Ports that anybody may reach through the service, without a token.
    #[serde(default)]
    pub public_ports: BTreeSet<u16>,
}

/// What in a policy cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct PolicyError {
    /// The field.
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl PolicyError {
    fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

/// What no sandbox may reach, whatever its policy says: cloud metadata, addresses that mean this
/// very host or this very link, groups of hosts.
pub fn reserved() -> Vec<Cidr> {
    let v4 = |a, b, c, d, length| Cidr::new(Ipv4Addr::new(a, b, c, d).into(), length);
    let v6 = |address: Ipv6Addr, length| Cidr::new(address.into(), length);
    vec![
        v4(0, 0, 0, 0, 8),
        v4(127, 0, 0, 0, 8),
        // Link-local: 169.254.169.254 and its kin.
        v4(169, 254, 0, 0, 16),
        v4(100, 100, 100, 200, 32),
        v4(168, 63, 129, 16, 32),
        v4(192, 0, 0, 192, 32),
        v4(224, 0, 0, 0, 3),
        v6(Ipv6Addr::UNSPECIFIED, 128),
        v6(Ipv6Addr::LOCALHOST, 128),
        // IPv4 in other clothes.
        v6(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96),
        v6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
        v6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
        v6(Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x254), 128),
        v6(Ipv6Addr::new(0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x254), 128),
    ]
}

fn name(text: &str) -> Option<String> {
    let text = text.trim_end_matches('.').to_ascii_lowercase();
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    // A name whose last part is a number is an address that was mistyped.
    let last = text.rsplit('.').next()?;
    let fits = text.len() <= 253 && text.split('.').all(label) && last.parse::<u64>().is_err();
    fits.then_some(text)
}

impl Destination {
    /// Understands a network, a host name, or `*.` and a name.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no destination: give an address, a network such as 192.0.2.0/24, a \
                 host name, or *.example.com"
            )
        };
        if let Some(below) = text.strip_prefix("*.") {
            return name(below).map(Self::NamesBelow).ok_or_else(wrong);
        }
        if text.contains(['/', ':']) || text.parse::<IpAddr>().is_ok() {
            let network: Cidr = text.parse().map_err(|_| wrong())?;
            return match reserved().iter().find(|r| r.covers(&network)) {
                Some(r) => Err(format!(
                    "{text:?} is in {r}, which no sandbox may reach (cloud metadata, this host, \
                     groups)"
                )),
                None => Ok(Self::Network(network)),
            };
        }
        name(text).map(Self::Name).ok_or_else(wrong)
    }

    /// Whether it is this name, or covers it.
    fn matches(&self, asked: &str) -> bool {
        match self {
            Self::Network(_) => false,
            Self::Name(name) => name == asked,
            Self::NamesBelow(name) => {
                asked.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'))
            }
        }
    }
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Network(network) => write!(f, "{network}"),
            Self::Name(name) => f.write_str(name),
            Self::NamesBelow(name) => write!(f, "*.{name}"),
        }
    }
}

impl Internet {
    /// Networks that may be reached, of a list.
    pub fn networks(&self) -> impl Iterator<Item = &Cidr> {
        let list = if let Self::Allow(list) = self { Some(list) } else { None };
        list.into_iter().flatten().filter_map(|d| match d {
            Destination::Network(network) => Some(network),
            _ => None,
        })
    }

    /// Whether a guest may ask for the addresses of `name` (lower case, no final dot).
    pub fn may_resolve(&self, name: &str) -> bool {
        match self {
            Self::Off => false,
            Self::On => true,
            Self::Allow(list) => list.iter().any(|d| d.matches(name)),
        }
    }
}

impl Policy {
    /// Nothing reached, nothing public: what a VM has that is nobody's yet.
    pub fn closed() -> Self {
        Self { internet: Internet::Off, ..Self::default() }
    }

    /// Checks what only the whole shows.
    pub fn check(&self) -> Result<(), PolicyError> {
        if let Internet::Allow(list) = &self.internet
            && list.len() > MAX_DESTINATIONS
        {
            let message = format!("{} destinations, at most {MAX_DESTINATIONS}", list.len());
            return Err(PolicyError::new("internet.allow", message));
        }
        let slow = |field: &str, value: Option<u64>, least: u64| match value {
            Some(value) if value < least => {
                let message = format!("{value} is less than {least}; leave it out for no limit");
                Err(PolicyError::new(format!("network_limits.{field}"), message))
            }
            _ => Ok(()),
        };
        slow("bytes_per_second", self.limits.bytes_per_second, MIN_BYTES_PER_SECOND)?;
        slow("packets_per_second", self.limits.packets_per_second, MIN_PACKETS_PER_SECOND)?;
        if self.public_ports.len() > MAX_PUBLIC_PORTS {
            let message = format!("{} ports, at most {MAX_PUBLIC_PORTS}", self.public_ports.len());
            return Err(PolicyError::new("public_ports", message));
        }
        if self.public_ports.contains(&0) {
            return Err(PolicyError::new("public_ports", "0 is no port"));
        }
        Ok(())
    }
}

/// `"off"`, `"on"`, `{"allow": [...]}`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Word(String),
    List(Allowed),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Allowed {
    allow: Vec<String>,
}

impl Serialize for Internet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_str("off"),
            Self::On => serializer.serialize_str("on"),
            Self::Allow(list) => Allowed { allow: list.iter().map(ToString::to_string).collect() }
                .serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Internet {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let wrong = || D::Error::custom("must be \"on\", \"off\" or {\"allow\": [destinations]}");
        match Written::deserialize(deserializer).map_err(|_| wrong())? {
            Written::Word(word) if word == "on" => Ok(Self::On),
            Written::Word(word) if word == "off" => Ok(Self::Off),
            Written::Word(_) => Err(wrong()),
            Written::List(Allowed { allow }) => {
                let list: Result<_, String> =
                    allow.iter().map(|text| Destination::parse(text)).collect();
                list.map(Self::Allow).map_err(|e| D::Error::custom(format!("allow: {e}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Internet, String> {
        serde_json::from_str(text).map_err(|e| e.to_string())
    }

    #[test]
    fn policies_are_read_and_written_alike() {
        assert_eq!(read("\"off\""), Ok(Internet::Off));
        assert_eq!(read("\"on\""), Ok(Internet::On));
        let text = r#"{"allow":["192.0.2.0/24","Example.COM.","*.example.org","2001:db8::1"]}"#;
        let list = read(text).unwrap();
        let again = serde_json::to_string(&list).unwrap();
        assert_eq!(read(&again), Ok(list.clone()));
        assert!(again.contains("192.0.2.0/24") && again.contains("2001:db8::1/128"), "{again}");
        assert_eq!(list.networks().count(), 2);
        assert!(list.may_resolve("example.com") && !list.may_resolve("www.example.com"));
        assert!(list.may_resolve("a.b.example.org") && !list.may_resolve("example.org"));
        assert!(!list.may_resolve("badexample.org"));
    }

    #[test]
    fn what_cannot_be_is_named() {
        for wrong in ["true", "\"yes\"", "{}", r#"{"deny":[]}"#, "[]"] {
            assert!(read(wrong).unwrap_err().contains("must be \"on\""), "{wrong}");
        }
        for wrong in ["10.0.0.0/33", "1.2.3", "a b", "*.", "-x.y", ":::", "http://x/"] {
            let said = read(&format!("{{\"allow\":[{wrong:?}]}}")).unwrap_err();
            assert!(said.contains("is no destination"), "{wrong}: {said}");
        }
        for wrong in ["169.254.169.254", "127.0.0.1", "fd00:ec2::254", "224.0.0.1", "::1"] {
            let said = read(&format!("{{\"allow\":[{wrong:?}]}}")).unwrap_err();
            assert!(said.contains("no sandbox may reach"), "{wrong}: {said}");
        }
        let slow = Limits { bytes_per_second: Some(1), packets_per_second: None };
        let policy = Policy { limits: slow, ..Policy::default() };
        assert_eq!(policy.check().unwrap_err().field, "network_limits.bytes_per_second");
        let policy = Policy { public_ports: [0].into(), ..Policy::default() };
        assert_eq!(policy.check().unwrap_err().field, "public_ports");
    }
}
