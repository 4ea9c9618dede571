//! Networks as `address/length`, and what is asked of them: who is inside, do two overlap, which
//! ranges do many of them make.

use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A network: an address of which the first `length` bits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    first: IpAddr,
    length: u8,
}

/// What is no network.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is neither an address nor a network such as 192.0.2.0/24 or 2001:db8::/32")]
pub struct NoCidr(String);

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl Cidr {
    /// The network of `length` bits that `address` is in.
    pub fn new(address: IpAddr, length: u8) -> Self {
        let free = width(address).saturating_sub(length);
        let kept = bits(address).checked_shr(u32::from(free)).unwrap_or(0);
        let value = kept.checked_shl(u32::from(free)).unwrap_or(0);
        let first = match address {
            IpAddr::V4(_) => std::net::Ipv4Addr::from(value as u32).into(),
            IpAddr::V6(_) => std::net::Ipv6Addr::from(value).into(),
        };
        Self { first, length }
    }

    /// Its first address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// Whether it is of IPv4.
    pub fn is_v4(&self) -> bool {
        self.first.is_ipv4()
    }

    /// First and last address, as numbers.
    pub fn range(&self) -> (u128, u128) {
        let free = u32::from(width(self.first).saturating_sub(self.length));
        let inside = 1_u128.checked_shl(free).map_or(u128::MAX, |n| n - 1);
        (bits(self.first), bits(self.first) | inside)
    }

    /// Whether `address` is in it.
    #[cfg(test)]
    pub fn contains(&self, address: IpAddr) -> bool {
        let (first, last) = self.range();
        address.is_ipv4() == self.is_v4() && (first..=last).contains(&bits(address))
    }

    /// Whether all of `other` is in it.
    pub fn covers(&self, other: &Self) -> bool {
        let (first, last) = self.range();
        let (low, high) = other.range();
        self.is_v4() == other.is_v4() && first <= low && high <= last
    }

    /// Whether an address is in both.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }
}

impl FromStr for Cidr {
    type Err = NoCidr;

    fn from_str(text: &str) -> Result<Self, NoCidr> {
        let wrong = || NoCidr(text.to_owned());
        let (address, length) = text.split_once('/').map_or((text, None), |(a, l)| (a, Some(l)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let length = match length {
            // `parse` would also take a sign.
            Some(l) if l.bytes().all(|b| b.is_ascii_digit()) => l.parse().map_err(|_| wrong())?,
            Some(_) => return Err(wrong()),
            None => width(address),
        };
        if length > width(address) { Err(wrong()) } else { Ok(Self::new(address, length)) }
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.first, self.length)
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The ranges that these networks make, apart from each other and in order: the kernel's interval
/// sets take no two that overlap.
pub fn ranges<'a>(networks: impl Iterator<Item = &'a Cidr>) -> Vec<(u128, u128)> {
    let mut all: Vec<_> = networks.map(Cidr::range).collect();
    all.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::with_capacity(all.len());
    for (first, last) in all {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn text_becomes_a_network() {
        assert_eq!(cidr("10.1.2.3/8").to_string(), "10.0.0.0/8");
        assert_eq!(cidr("192.0.2.7").to_string(), "192.0.2.7/32");
        assert_eq!(cidr("2001:db8::1/32").to_string(), "2001:db8::/32");
        assert_eq!(cidr("0.0.0.0/0").range(), (0, u128::from(u32::MAX)));
        assert_eq!(cidr("::/0").range(), (0, u128::MAX));
        for wrong in ["", "10.0.0.0/33", "10.0.0/8", "::/129", "10.0.0.0/+8", "example.com", "/8"] {
            assert!(wrong.parse::<Cidr>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn inside_and_outside() {
        let net = cidr("10.231.0.0/16");
        assert!(net.contains("10.231.255.255".parse().unwrap()));
        assert!(!net.contains("10.232.0.0".parse().unwrap()));
        assert!(!net.contains("::ffff:10.231.0.1".parse().unwrap()));
        assert!(cidr("10.0.0.0/8").overlaps(&net) && net.overlaps(&cidr("10.0.0.0/8")));
        assert!(!net.overlaps(&cidr("10.232.0.0/16")));
        assert!(!cidr("::/0").overlaps(&net));
    }

    #[test]
    fn overlapping_networks_make_one_range() {
        let nets = ["10.0.1.0/24", "10.0.0.0/16", "10.1.0.0/32", "10.2.0.0/16", "10.1.0.1"];
        let nets: Vec<Cidr> = nets.iter().map(|n| cidr(n)).collect();
        let found = ranges(nets.iter());
        assert_eq!(found, [(0x0a00_0000, 0x0a01_0001), (0x0a02_0000, 0x0a02_ffff)]);
        assert_eq!(ranges([cidr("::/0"), cidr("::1")].iter()), [(0, u128::MAX)]);
    }
}
