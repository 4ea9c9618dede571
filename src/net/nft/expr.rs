//! Rules: what a packet must be like, what is counted, and what becomes of it.
//!
//! A rule is a list of expressions that each load something into a register, compare it, or end the
//! rule; the first comparison that does not hold ends it, too.

use std::net::IpAddr;

use guest_agent::netlink::Attributes;

use super::{COUNTER, text};

/// The only register that is needed: every load is followed by its comparison.
const REGISTER: u32 = 1;
const VERDICT_REGISTER: u32 = 0;
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;

const LINK_HEADER: u32 = 0;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;

const CT_STATE: u32 = 0;
const CT_DIRECTION: u32 = 1;
/// Bits of a connection's state.
const ESTABLISHED: u32 = 2;
const RELATED: u32 = 4;

/// Which protocol addresses are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    /// Where addresses are in the packet: source, destination, length.
    fn places(self) -> (u32, u32, u32) {
        match self {
            Self::V4 => (12, 16, 4),
            Self::V6 => (8, 24, 16),
        }
    }

    /// The number by which `nft` knows how to print keys.
    pub(super) fn key_type(self) -> u32 {
        match self {
            Self::V4 => 7,
            Self::V6 => 8,
        }
    }

    pub(super) fn key_length(self) -> u32 {
        self.places().2
    }

    fn of(address: IpAddr) -> (Self, Vec<u8>) {
        match address {
            IpAddr::V4(v4) => (Self::V4, v4.octets().to_vec()),
            IpAddr::V6(v6) => (Self::V6, v6.octets().to_vec()),
        }
    }
}

/// A rate above which a rule holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Packets a second.
    Packets(u64),
    /// Bytes a second.
    Bytes(u64),
}

/// The end of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The packet passes.
    Accept,
    /// It is gone.
    Drop,
    /// Its sender is told that it may not.
    Reject,
    /// Another chain is gone through, then the next rule.
    Jump(&'static str),
    /// It leaves with the address of the link it leaves by.
    Masquerade,
}

/// A rule being built: conditions first, then what is done.
#[derive(Debug, Clone, Default)]
pub struct Rule {
    expressions: Attributes,
}

/// A value as the kernel wants it wrapped.
pub(super) fn value(bytes: &[u8]) -> Attributes {
    Attributes::new().put(1, bytes)
}

fn word(number: u32) -> [u8; 4] {
    number.to_be_bytes()
}

#[allow(
    clippy::wrong_self_convention,
    reason = "a builder whose methods read as the rule they make: from_link, to_port"
)]
impl Rule {
    /// Holds for every packet.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn expressions(self) -> Attributes {
        self.expressions
    }

    fn push(mut self, name: &str, data: &Attributes) -> Self {
        let expression = Attributes::new().put(1, &text(name)).nest(2, data);
        self.expressions = self.expressions.nest(1, &expression);
        self
    }

    fn compare(self, operator: u32, bytes: &[u8]) -> Self {
        let data = Attributes::new()
            .put(1, &word(REGISTER))
            .put(2, &word(operator))
            .nest(3, &value(bytes));
        self.push("cmp", &data)
    }

    fn meta(self, key: u32) -> Self {
        self.push("meta", &Attributes::new().put(1, &word(REGISTER)).put(2, &word(key)))
    }

    fn payload(self, base: u32, offset: u32, length: u32) -> Self {
        let data = Attributes::new()
            .put(1, &word(REGISTER))
            .put(2, &word(base))
            .put(3, &word(offset))
            .put(4, &word(length));
        self.push("payload", &data)
    }

    fn ct(self, key: u32) -> Self {
        self.push("ct", &Attributes::new().put(1, &word(REGISTER)).put(2, &word(key)))
    }

    fn masked(self, mask: &[u8]) -> Self {
        let data = Attributes::new()
            .put(1, &word(REGISTER))
            .put(2, &word(REGISTER))
            .put(3, &word(mask.len() as u32))
            .nest(4, &value(mask))
            .nest(5, &value(&vec![0; mask.len()]));
        self.push("bitwise", &data)
    }

    /// Came in over this link.
    pub fn from_link(self, name: &str) -> Self {
        self.meta(META_IIFNAME).compare(EQUAL, &link_name(name))
    }

    /// Came in over a link whose name begins so.
    pub fn from_links(self, prefix: &str) -> Self {
        self.meta(META_IIFNAME).compare(EQUAL, prefix.as_bytes())
    }

    /// Goes out over a link whose name begins so.
    pub fn to_links(self, prefix: &str) -> Self {
        self.meta(META_OIFNAME).compare(EQUAL, prefix.as_bytes())
    }

    /// Goes out over a link whose name does not begin so.
    pub fn to_other_links(self, prefix: &str) -> Self {
        self.meta(META_OIFNAME).compare(NOT_EQUAL, prefix.as_bytes())
    }

    /// Is of this protocol.
    pub fn family(self, family: Family) -> Self {
        self.meta(META_NFPROTO).compare(EQUAL, &[family.number()])
    }

    fn address(self, family: Family, source: bool) -> Self {
        let (from, to, length) = family.places();
        self.family(family).payload(NETWORK_HEADER, if source { from } else { to }, length)
    }

    /// Comes from this address.
    pub fn source(self, address: IpAddr) -> Self {
        let (family, bytes) = Family::of(address);
        self.address(family, true).compare(EQUAL, &bytes)
    }

    /// Is of the address's protocol and comes from another address.
    pub fn other_source(self, address: IpAddr) -> Self {
        let (family, bytes) = Family::of(address);
        self.address(family, true).compare(NOT_EQUAL, &bytes)
    }

    /// Comes from a network; `length` a whole number of bytes.
    pub fn source_in(self, network: IpAddr, length: u8) -> Self {
        let (family, bytes) = Family::of(network);
        let bytes = &bytes[..usize::from(length / 8)];
        let (from, _, _) = family.places();
        self.family(family).payload(NETWORK_HEADER, from, bytes.len() as u32).compare(EQUAL, bytes)
    }

    /// Comes from another hardware address.
    pub fn other_hardware_source(self, mac: [u8; 6]) -> Self {
        self.payload(LINK_HEADER, 6, 6).compare(NOT_EQUAL, &mac)
    }

    /// Goes to an address in this set.
    pub fn to_set(self, family: Family, set: &str) -> Self {
        let data = Attributes::new().put(1, &text(set)).put(2, &word(REGISTER));
        self.address(family, false).push("lookup", &data)
    }

    /// Is of TCP (6), UDP (17) or another transport.
    pub fn transport(self, protocol: u8) -> Self {
        self.meta(META_L4PROTO).compare(EQUAL, &[protocol])
    }

    /// Goes to this port, of a transport that has ports.
    pub fn to_port(self, port: u16) -> Self {
        self.payload(TRANSPORT_HEADER, 2, 2).compare(EQUAL, &port.to_be_bytes())
    }

    /// Is an ICMP message of this type, of a protocol already asked for.
    pub fn icmp_type(self, kind: u8) -> Self {
        self.payload(TRANSPORT_HEADER, 0, 1).compare(EQUAL, &[kind])
    }

    /// Is of a connection that is known, or an error about one.
    pub fn of_known_connection(self) -> Self {
        let bits = (ESTABLISHED | RELATED).to_ne_bytes();
        self.ct(CT_STATE).masked(&bits).compare(NOT_EQUAL, &[0; 4])
    }

    /// Answers whoever opened its connection.
    pub fn is_reply(self) -> Self {
        self.ct(CT_DIRECTION).compare(EQUAL, &[1])
    }

    /// Is above a rate.
    pub fn above(self, limit: Limit) -> Self {
        // A tenth of a second at once, and at least what one exchange of big packets needs.
        let (rate, burst, kind) = match limit {
            Limit::Packets(rate) => (rate, (rate / 10).max(64), 0),
            Limit::Bytes(rate) => (rate, (rate / 10).max(64 << 10), 1),
        };
        let burst = u32::try_from(burst).unwrap_or(u32::MAX);
        let data = Attributes::new()
            .put(1, &rate.to_be_bytes())
            .put(2, &1_u64.to_be_bytes())
            .put(3, &word(burst))
            .put(4, &word(kind))
            .put(5, &word(1));
        self.push("limit", &data)
    }

    /// Counts it.
    pub fn count(self, counter: &str) -> Self {
        let data = Attributes::new().put(1, &word(COUNTER)).put(2, &text(counter));
        self.push("objref", &data)
    }

    /// What becomes of the packet.
    pub fn then(self, verdict: &Verdict) -> Self {
        let (code, chain): (i32, Option<&str>) = match verdict {
            Verdict::Accept => (1, None),
            Verdict::Drop => (0, None),
            Verdict::Jump(chain) => (-3, Some(chain)),
            // Of either protocol, "administratively prohibited".
            Verdict::Reject => {
                return self.push("reject", &Attributes::new().put(1, &word(2)).put(2, &[3]));
            }
            Verdict::Masquerade => return self.push("masq", &Attributes::new()),
        };
        let mut inner = Attributes::new().put(1, &code.to_be_bytes());
        if let Some(chain) = chain {
            inner = inner.put(2, &text(chain));
        }
        let data = Attributes::new()
            .put(1, &word(VERDICT_REGISTER))
            .nest(2, &Attributes::new().nest(2, &inner));
        self.push("immediate", &data)
    }
}

/// A link's name, filled up: all 16 bytes are compared.
fn link_name(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    let n = name.len().min(15);
    bytes[..n].copy_from_slice(&name.as_bytes()[..n]);
    bytes
}
