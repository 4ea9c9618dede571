//! nftables by netlink: tables, chains, sets, rules, all in one transaction.
//!
//! What is sent is a list of messages that take effect together or not at all. The kernel's names
//! and numbers are those of `<linux/netfilter/nf_tables.h>`; only what rethaw's rules need is here.

mod expr;
mod set;

use std::io;

use guest_agent::netlink::{Attributes, Netlink, Request, attributes};
use nix::sys::socket::SockProtocol;

pub use expr::{Family, Limit, Rule, Verdict};
pub use set::{Element, SetKind};

/// Subsystems of nfnetlink.
const NFTABLES: u16 = 10;
const CONNTRACK: u16 = 1;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const DELETE_RULE: u16 = 8;
const NEW_SET: u16 = 9;
const NEW_ELEMENT: u16 = 12;
const DELETE_ELEMENT: u16 = 14;
const NEW_OBJECT: u16 = 18;
const GET_OBJECT: u16 = 19;
const CONNTRACK_DELETE: u16 = 2;

/// One family for IPv4 and IPv6.
const INET: u8 = 1;
/// Kind of a named counter.
const COUNTER: u32 = 1;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;

/// Where a chain is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Every packet that comes in.
    Prerouting,
    /// Packets for this namespace itself.
    Input,
    /// Packets that pass through.
    Forward,
    /// Source addresses of packets that go out, at the first packet of a connection.
    SourceNat,
}

/// Changes to one table, in order.
#[derive(Debug)]
pub struct Batch {
    table: Vec<u8>,
    requests: Vec<Request>,
    // For error messages.
    what: Vec<String>,
}

/// What a named counter has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Opens a socket for nftables in this thread's namespace.
pub fn open() -> io::Result<Netlink> {
    Netlink::open(SockProtocol::NetlinkNetFilter)
}

fn text(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn message(subsystem: u16, kind: u16, flags: i32, family: u8) -> Request {
    Request::new((subsystem << 8) | kind, flags).payload(&[family, 0, 0, 0])
}

fn border(kind: u16) -> Request {
    let [high, low] = NFTABLES.to_be_bytes();
    Request::new(kind, 0).payload(&[0, 0, high, low])
}

impl Batch {
    /// No changes yet to `table`.
    pub fn new(table: &str) -> Self {
        Self { table: text(table), requests: Vec::new(), what: Vec::new() }
    }

    fn push(mut self, request: Request, what: String) -> Self {
        self.requests.push(request);
        self.what.push(what);
        self
    }

    /// Makes the table; one that is there stays as it is.
    pub fn table(self) -> Self {
        let request = message(NFTABLES, NEW_TABLE, libc_flags::CREATE, INET);
        let request = request.attribute(1, &self.table).attribute(2, &0_u32.to_be_bytes());
        self.push(request, "table".to_owned())
    }

    /// Removes the table and all in it.
    pub fn delete_table(self) -> Self {
        let request = message(NFTABLES, DELETE_TABLE, 0, INET).attribute(1, &self.table);
        self.push(request, "removal of the table".to_owned())
    }

    /// Makes a chain that other chains jump to.
    pub fn chain(self, name: &str) -> Self {
        let request = message(NFTABLES, NEW_CHAIN, libc_flags::CREATE, INET);
        let request = request.attribute(1, &self.table).attribute(3, &text(name));
        self.push(request, format!("chain {name}"))
    }

    /// Makes a chain that packets enter at `hook`; those that no rule decides on are accepted or
    /// dropped.
    pub fn base_chain(self, name: &str, hook: Hook, accept: bool) -> Self {
        let (number, priority, kind): (u32, i32, &str) = match hook {
            Hook::Prerouting => (0, -300, "filter"),
            Hook::Input => (1, 0, "filter"),
            Hook::Forward => (2, 0, "filter"),
            Hook::SourceNat => (4, 100, "nat"),
        };
        let place = Attributes::new().put(1, &number.to_be_bytes()).put(2, &priority.to_be_bytes());
        let policy = if accept { ACCEPT } else { DROP };
        let request = message(NFTABLES, NEW_CHAIN, libc_flags::CREATE, INET)
            .attribute(1, &self.table)
            .attribute(3, &text(name))
            .nested(4, &place)
            .attribute(5, &policy.to_be_bytes())
            .attribute(7, &text(kind));
        self.push(request, format!("chain {name}"))
    }

    /// Makes a named counter.
    pub fn counter(self, name: &str) -> Self {
        let request = message(NFTABLES, NEW_OBJECT, libc_flags::CREATE, INET)
            .attribute(1, &self.table)
            .attribute(2, &text(name))
            .attribute(3, &COUNTER.to_be_bytes())
            .nested(4, &Attributes::new());
        self.push(request, format!("counter {name}"))
    }

    /// Makes a set.
    pub fn set(self, name: &str, family: Family, kind: SetKind) -> Self {
        // Ids tie a set to its elements within one batch.
        let id = self.requests.len() as u32 + 1;
        let request = message(NFTABLES, NEW_SET, libc_flags::CREATE, INET)
            .attribute(1, &self.table)
            .attribute(2, &text(name))
            .attribute(3, &kind.flags().to_be_bytes())
            .attribute(4, &family.key_type().to_be_bytes())
            .attribute(5, &family.key_length().to_be_bytes())
            .attribute(10, &id.to_be_bytes());
        self.push(request, format!("set {name}"))
    }

    /// Puts elements into a set.
    pub fn elements(self, set: &str, elements: &[Element]) -> Self {
        if elements.is_empty() {
            return self;
        }
        let list = elements.iter().fold(Attributes::new(), |list, e| list.nest(1, &e.attributes()));
        let request = message(NFTABLES, NEW_ELEMENT, libc_flags::CREATE, INET)
            .attribute(1, &self.table)
            .attribute(2, &text(set))
            .nested(3, &list);
        self.push(request, format!("elements of {set}"))
    }

    /// Takes elements, which must be there, out of a set.
    pub fn remove_elements(self, set: &str, elements: &[Element]) -> Self {
        if elements.is_empty() {
            return self;
        }
        let list = elements.iter().fold(Attributes::new(), |list, e| list.nest(1, &e.key()));
        let request = message(NFTABLES, DELETE_ELEMENT, 0, INET)
            .attribute(1, &self.table)
            .attribute(2, &text(set))
            .nested(3, &list);
        self.push(request, format!("removal from {set}"))
    }

    /// Empties a set.
    pub fn flush_set(self, set: &str) -> Self {
        let request = message(NFTABLES, DELETE_ELEMENT, 0, INET)
            .attribute(1, &self.table)
            .attribute(2, &text(set));
        self.push(request, format!("emptying {set}"))
    }

    /// Appends a rule to a chain.
    pub fn rule(self, chain: &str, rule: Rule) -> Self {
        let flags = libc_flags::CREATE | libc_flags::APPEND;
        let request = message(NFTABLES, NEW_RULE, flags, INET)
            .attribute(1, &self.table)
            .attribute(2, &text(chain))
            .nested(4, &rule.expressions());
        self.push(request, format!("rule in {chain}"))
    }

    /// Removes every rule of a chain.
    pub fn flush_chain(self, chain: &str) -> Self {
        let request = message(NFTABLES, DELETE_RULE, 0, INET)
            .attribute(1, &self.table)
            .attribute(2, &text(chain));
        self.push(request, format!("emptying {chain}"))
    }

    /// Makes all of it so.
    pub fn commit(self, netlink: &mut Netlink) -> io::Result<()> {
        let done = netlink.batch(border(BATCH_BEGIN), self.requests, border(BATCH_END));
        done.map_err(|(place, e)| {
            let what = place.and_then(|place| self.what.get(place));
            let what = what.map_or("transaction", String::as_str);
            io::Error::new(e.kind(), format!("nftables: {what}: {e}"))
        })
    }
}

/// Whether there is such a table.
pub fn has_table(netlink: &mut Netlink, table: &str) -> io::Result<bool> {
    let request = message(NFTABLES, GET_TABLE, 0, INET).attribute(1, &text(table));
    match netlink.ask(request) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// What the table's named counters have counted.
pub fn counters(netlink: &mut Netlink, table: &str) -> io::Result<Vec<(String, Count)>> {
    let request = message(NFTABLES, GET_OBJECT, libc_flags::DUMP, INET)
        .attribute(1, &text(table))
        .attribute(3, &COUNTER.to_be_bytes());
    let answers = netlink.ask(request)?;
    Ok(answers
        .iter()
        .filter_map(|answer| {
            let find = |wanted: u16| {
                answer.attributes(4).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
            };
            let name = find(2)?.split(|b| *b == 0).next()?;
            let mut count = Count::default();
            for (kind, value) in attributes(find(4)?) {
                let number = u64::from_be_bytes(value.try_into().ok()?);
                match kind {
                    1 => count.bytes = number,
                    2 => count.packets = number,
                    _ => {}
                }
            }
            Some((String::from_utf8_lossy(name).into_owned(), count))
        })
        .collect())
}

/// Forgets every connection that passes through the socket's namespace: what comes of them from now
/// on is of no connection.
pub fn forget_connections(netlink: &mut Netlink) -> io::Result<()> {
    netlink.change(message(CONNTRACK, CONNTRACK_DELETE, 0, 0))
}

/// Request flags of netlink, under shorter names.
mod libc_flags {
    pub const CREATE: i32 = nix::libc::NLM_F_CREATE;
    pub const APPEND: i32 = nix::libc::NLM_F_APPEND;
    pub const DUMP: i32 = nix::libc::NLM_F_DUMP;
}
