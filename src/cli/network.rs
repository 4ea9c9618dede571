//! Flags of `rethaw serve` about the networks of sandboxes.

use std::net::{IpAddr, Ipv4Addr};

use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::net::cidr::Cidr;

/// Whether sandboxes have networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkChoice {
    /// Where the service can make them.
    #[default]
    Auto,
    /// Always; the service does not start where it cannot make them.
    On,
    /// Never.
    Off,
}

/// The flags; in the file they are below `[network]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkArgs {
    /// Give each sandbox a network of its own [default: auto]
    #[arg(id = "network", long = "network", env = "RETHAW_NETWORK", value_enum)]
    pub mode: Option<NetworkChoice>,

    /// The /16 network that sandboxes get addresses from [default: a free one of a few]
    #[arg(long = "network-range", env = "RETHAW_NETWORK_RANGE", value_name = "NETWORK",
          value_parser = parse_range)]
    #[serde(deserialize_with = "range_in_file")]
    pub range: Option<Ipv4Addr>,

    /// Name server for sandboxes, in place of the host's; may be given several times
    #[arg(long = "dns", env = "RETHAW_DNS", value_name = "ADDR", value_delimiter = ',')]
    pub dns: Vec<IpAddr>,

    /// Network that no sandbox may reach, besides cloud metadata and the host itself; may be given
    /// several times
    #[arg(
        long = "deny-egress",
        env = "RETHAW_DENY_EGRESS",
        value_name = "NETWORK",
        value_delimiter = ','
    )]
    pub deny_egress: Vec<Cidr>,

    /// Domain of host names like 8080-ID.DOMAIN, which lead to ports of sandboxes
    /// [default: any]
    #[arg(long, env = "RETHAW_DOMAIN", value_name = "NAME")]
    pub domain: Option<String>,
}

impl NetworkArgs {
    /// These, and where they say nothing, the others.
    pub fn or(self, other: Self) -> Self {
        let either = |one: Vec<_>, other| if one.is_empty() { other } else { one };
        Self {
            mode: self.mode.or(other.mode),
            range: self.range.or(other.range),
            dns: if self.dns.is_empty() { other.dns } else { self.dns },
            deny_egress: either(self.deny_egress, other.deny_egress),
            domain: self.domain.or(other.domain),
        }
    }
}

fn parse_range(text: &str) -> Result<Ipv4Addr, String> {
    let wrong = || format!("{text:?} is no IPv4 network of 16 bits, such as 10.231.0.0/16");
    let network: Cidr = text.parse().map_err(|_| wrong())?;
    match network.first() {
        IpAddr::V4(first) if text.ends_with("/16") => Ok(first),
        _ => Err(wrong()),
    }
}

fn range_in_file<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Ipv4Addr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_range(&text).map(Some).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_sixteen_bits() {
        assert_eq!(parse_range("10.9.0.0/16"), Ok(Ipv4Addr::new(10, 9, 0, 0)));
        for wrong in ["10.9.0.0", "10.9.0.0/24", "fd00::/16", "10.9/16", ""] {
            assert!(parse_range(wrong).is_err(), "{wrong}");
        }
    }
}
