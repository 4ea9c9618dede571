//! Sets of addresses: ranges that an operator or a user named, and single addresses that go again
//! after a while.

use std::net::IpAddr;
use std::time::Duration;

use guest_agent::netlink::Attributes;

use super::expr::value;

const INTERVAL: u32 = 4;
const TIMEOUT: u32 = 0x10;
const INTERVAL_END: u32 = 1;

/// What kind of set it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetKind {
    /// Ranges.
    Ranges,
    /// Single addresses, each for a time of its own.
    Passing,
}

impl SetKind {
    pub(super) fn flags(self) -> u32 {
        match self {
            Self::Ranges => INTERVAL,
            Self::Passing => TIMEOUT,
        }
    }
}

/// An element of a set. A range is two: where it begins, and where it has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    key: Vec<u8>,
    end: bool,
    timeout: Option<Duration>,
}

fn key(number: u128, v4: bool) -> Vec<u8> {
    if v4 { (number as u32).to_be_bytes().to_vec() } else { number.to_be_bytes().to_vec() }
}

impl Element {
    /// The elements of ranges that do not touch each other, as [`crate::net::cidr::ranges`] makes
    /// them.
    pub fn ranges(ranges: &[(u128, u128)], v4: bool) -> Vec<Self> {
        let most = if v4 { u128::from(u32::MAX) } else { u128::MAX };
        let mut elements = Vec::with_capacity(ranges.len() * 2);
        for &(first, last) in ranges {
            elements.push(Self { key: key(first, v4), end: false, timeout: None });
            // A range up to the last address there is has no end.
            if last < most {
                elements.push(Self { key: key(last + 1, v4), end: true, timeout: None });
            }
        }
        elements
    }

    /// An address for a while.
    pub fn passing(address: IpAddr, timeout: Duration) -> Self {
        let key = match address {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        Self { key, end: false, timeout: Some(timeout) }
    }

    /// What names it.
    pub(super) fn key(&self) -> Attributes {
        Attributes::new().nest(1, &value(&self.key))
    }

    pub(super) fn attributes(&self) -> Attributes {
        let mut attributes = self.key();
        if self.end {
            attributes = attributes.put(3, &INTERVAL_END.to_be_bytes());
        }
        if let Some(timeout) = self.timeout {
            attributes = attributes.put(4, &(timeout.as_millis() as u64).to_be_bytes());
        }
        attributes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_range_has_no_end() {
        let elements = Element::ranges(&[(1, 2), (9, u128::from(u32::MAX))], true);
        let ends: Vec<bool> = elements.iter().map(|e| e.end).collect();
        assert_eq!(ends, [false, true, false]);
        assert_eq!(elements[1].key, [0, 0, 0, 3]);
        assert_eq!(Element::ranges(&[(0, u128::MAX)], false).len(), 1);
    }
}
