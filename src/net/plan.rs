//! Who has which address and which name: everything follows from a slot's number.
//!
//! ```text
//!              guest's network namespace side          |  slot's namespace         |  service's
//!   guest eth0 .2 ----------------------------- tap0 .1|.5 up0 ------------------- |.4 rtXXXXXX-n
//! ```
//!
//! Eight IPv4 addresses a slot: two for guest and gateway, two for the cable between the slot's
//! namespace and the service's. IPv6 has a /64 a slot, out of a prefix of the home's own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cidr::Cidr;

/// Prefix length of all slots together.
pub const PREFIX: u8 = 16;
/// Prefix length of one slot.
const SLOT_PREFIX: u8 = 29;
/// Slots there are addresses for. The first eight addresses stay unused.
pub const SLOTS: u16 = 1 << (SLOT_PREFIX - PREFIX);
/// Guest and gateway.
pub const GUEST_PREFIX: u8 = 30;
/// The same in IPv6.
pub const GUEST_PREFIX_V6: u8 = 126;
/// The cable to the service's namespace.
pub const CABLE_PREFIX: u8 = 31;
/// The same in IPv6.
pub const CABLE_PREFIX_V6: u8 = 127;

/// Networks tried, in this order, when the operator named none.
pub const CANDIDATES: &[Ipv4Addr] = &[
    Ipv4Addr::new(10, 231, 0, 0),
    Ipv4Addr::new(10, 197, 0, 0),
    Ipv4Addr::new(172, 29, 0, 0),
    Ipv4Addr::new(10, 83, 0, 0),
    Ipv4Addr::new(172, 26, 0, 0),
    Ipv4Addr::new(10, 149, 0, 0),
];

/// The addresses of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Beginning of the names of its links: of this home and of no other.
    pub link_prefix: String,
    /// Name of its nftables table.
    pub table: String,
    /// All slots' IPv4 addresses.
    pub v4: Cidr,
    /// All slots' IPv6 addresses, where guests have any.
    pub v6: Option<Cidr>,
}

/// What one slot is called and has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// The slot's number.
    pub slot: u16,
    /// Guest's IPv4 address.
    pub ipv4: Ipv4Addr,
    /// Its gateway and name server.
    pub gateway: Ipv4Addr,
    /// Guest's IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Its gateway.
    pub gateway_v6: Option<Ipv6Addr>,
}

impl Plan {
    /// The plan of the service whose data is in `home`.
    pub fn new(home: &str, v4: Ipv4Addr, v6: bool) -> Self {
        let digest = Sha256::digest(home.as_bytes());
        let name = hex::encode(&digest[..3]);
        // A unique local prefix (RFC 4193) of this home's own.
        let mut bits = [0; 16];
        bits[0] = 0xfd;
        bits[1..6].copy_from_slice(&digest[3..8]);
        Self {
            link_prefix: format!("rt{name}-"),
            table: format!("rethaw-{name}"),
            v4: Cidr::new(v4.into(), PREFIX),
            v6: v6.then(|| Cidr::new(Ipv6Addr::from(bits).into(), 48)),
        }
    }

    fn v4_at(&self, slot: u16, offset: u32) -> Ipv4Addr {
        let IpAddr::V4(base) = self.v4.first() else { return Ipv4Addr::UNSPECIFIED };
        Ipv4Addr::from(u32::from(base) + u32::from(slot) * 8 + offset)
    }

    fn v6_at(&self, slot: u16, offset: u32) -> Option<Ipv6Addr> {
        let IpAddr::V6(base) = self.v6?.first() else { return None };
        Some(Ipv6Addr::from(u128::from(base) | (u128::from(slot) << 64) | u128::from(offset)))
    }

    /// What slot number `slot` has.
    pub fn addresses(&self, slot: u16) -> Addresses {
        Addresses {
            slot,
            ipv4: self.v4_at(slot, 2),
            gateway: self.v4_at(slot, 1),
            ipv6: self.v6_at(slot, 2),
            gateway_v6: self.v6_at(slot, 1),
        }
    }

    /// Ends of the cable: the service's, the slot's.
    pub fn cable(&self, slot: u16) -> (Ipv4Addr, Ipv4Addr) {
        (self.v4_at(slot, 4), self.v4_at(slot, 5))
    }

    /// Ends of the cable in IPv6.
    pub fn cable_v6(&self, slot: u16) -> Option<(Ipv6Addr, Ipv6Addr)> {
        Some((self.v6_at(slot, 0x1_0000)?, self.v6_at(slot, 0x1_0001)?))
    }

    /// Name of the service's end of the cable.
    pub fn link(&self, slot: u16) -> String {
        format!("{}{slot:x}", self.link_prefix)
    }
}

impl Addresses {
    /// The settings that go to the guest.
    pub fn for_guest(&self, mac: &str) -> guest_agent::wire::NetworkSettings {
        use guest_agent::wire::{Ipv4Config, Ipv6Config, NetworkSettings};
        NetworkSettings {
            mac: mac.to_owned(),
            ipv4: Some(Ipv4Config {
                cidr: format!("{}/{GUEST_PREFIX}", self.ipv4),
                gateway: Some(self.gateway.to_string()),
            }),
            ipv6: self.ipv6.map(|address| Ipv6Config {
                cidr: format!("{address}/{GUEST_PREFIX_V6}"),
                gateway: self.gateway_v6.map(|g| g.to_string()),
            }),
            dns: vec![self.gateway.to_string()],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_slots_share_anything() {
        let plan = Plan::new("/var/lib/rethaw", Ipv4Addr::new(10, 231, 0, 0), true);
        let mut seen = HashSet::new();
        for slot in 1..SLOTS {
            let a = plan.addresses(slot);
            let (near, far) = plan.cable(slot);
            let (near6, far6) = plan.cable_v6(slot).unwrap();
            for v4 in [a.ipv4, a.gateway, near, far] {
                assert!(plan.v4.contains(v4.into()) && seen.insert(IpAddr::from(v4)), "{v4}");
            }
            for v6 in [a.ipv6.unwrap(), a.gateway_v6.unwrap(), near6, far6] {
                assert!(plan.v6.unwrap().contains(v6.into()) && seen.insert(v6.into()), "{v6}");
            }
            // The kernel's limit is 15.
            assert!(plan.link(slot).len() <= 15);
        }
    }

    #[test]
    fn another_home_has_other_names() {
        let one = Plan::new("/a", CANDIDATES[0], true);
        let other = Plan::new("/b", CANDIDATES[0], true);
        assert_ne!(one.link_prefix, other.link_prefix);
        assert_ne!(one.table, other.table);
        assert_ne!(one.v6, other.v6);
    }
}
