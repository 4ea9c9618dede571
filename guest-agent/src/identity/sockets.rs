//! TCP connections that the template had: their peers are gone, or worse, belong to another clone
//! with the same sequence numbers. All that do not stay inside the machine are closed.

use super::proof::{Context, Item, ItemError, Reading};
use super::ready::{self, SharedNetlink};
use crate::agent::Agent;
use crate::netlink::{Message, Netlink, Request};
use std::cell::{Cell, RefCell};
use std::io;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Size of the kernel's inet_diag_req_v2, and of the socket id at the end of it.
const REQUEST: usize = 56;
/// Every state but LISTEN (10), TIME_WAIT (6) and NEW_SYN_RECV (12).
const CONNECTED: u32 = 0xfff & !(1 << 10) & !(1 << 6);

/// The item, with the socket to ask by and the connections last seen.
#[derive(Debug)]
pub struct Sockets {
    netlink: io::Result<SharedNetlink>,
    seen: RefCell<Vec<Message>>,
    /// What was seen is from this moment: it need not be asked for again.
    fresh: Cell<bool>,
}

impl Sockets {
    /// The item.
    pub fn new(agent: &Agent) -> Self {
        let netlink = ready::sock_diag(agent);
        Self { netlink, seen: RefCell::default(), fresh: Cell::new(false) }
    }
}

fn request(family: u8, states: u32, id: &[u8]) -> [u8; REQUEST] {
    let mut body = [0; REQUEST];
    body[0] = family;
    body[1] = libc::IPPROTO_TCP as u8;
    body[4..8].copy_from_slice(&states.to_ne_bytes());
    body[8..8 + id.len()].copy_from_slice(id);
    body
}

/// The id of a socket in an inet_diag_msg: ports, addresses, interface, cookie.
fn id(message: &Message) -> Option<&[u8]> {
    message.body.get(4..52)
}

fn stays_inside(message: &Message) -> bool {
    let Some(id) = id(message) else { return true };
    let remote = &id[20..36];
    match i32::from(message.body[0]) {
        libc::AF_INET => remote[0] == 127,
        _ => {
            let mapped = remote[..10] == [0; 10] && remote[10..12] == [0xff; 2];
            (mapped && remote[12] == 127) || (remote[..15] == [0; 15] && remote[15] == 1)
        }
    }
}

fn connections(netlink: &mut Netlink) -> io::Result<Vec<Message>> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let dump = Request::new(SOCK_DIAG_BY_FAMILY, libc::NLM_F_DUMP).payload(&request(
            family as u8,
            CONNECTED,
            &[],
        ));
        all.extend(netlink.ask(dump)?);
    }
    all.retain(|m| m.kind == SOCK_DIAG_BY_FAMILY && !stays_inside(m));
    Ok(all)
}

/// Whether there are any such connections.
///
/// # Errors
/// The kernel does not say.
pub fn any(agent: &Agent) -> io::Result<bool> {
    let netlink = ready::sock_diag(agent)?;
    Ok(!connections(&mut netlink.borrow_mut())?.is_empty())
}

impl Item for Sockets {
    fn name(&self) -> &'static str {
        "sockets"
    }

    fn not_applicable(&self, _: &Context<'_>) -> Option<String> {
        let found = match &self.netlink {
            Ok(netlink) => connections(&mut netlink.borrow_mut()),
            Err(error) => return Some(format!("no sock_diag: {error}")),
        };
        match found {
            Ok(found) => {
                *self.seen.borrow_mut() = found;
                self.fresh.set(true);
                None
            }
            // Only of a kernel built without it. Any other trouble is for the read to report.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Some(format!("the kernel does not list sockets: {error}"))
            }
            Err(_) => None,
        }
    }

    fn read(&self, _: &Context<'_>) -> Result<Reading, ItemError> {
        if !self.fresh.take() {
            let list = match &self.netlink {
                Ok(netlink) => connections(&mut netlink.borrow_mut()),
                Err(error) => Err(ready::again(error)),
            };
            *self.seen.borrow_mut() = list.map_err(ItemError::io("list sockets"))?;
        }
        let list = self.seen.borrow();
        let ids = list.iter().filter_map(id).map(hex::encode);
        let mut reading = Reading::of(ids.collect::<String>());
        reading.details.insert("connections".to_owned(), list.len().to_string());
        Ok(reading)
    }

    fn apply(&mut self, _: &Context<'_>) -> Result<(), ItemError> {
        let Ok(netlink) = &self.netlink else { return Ok(()) };
        let mut netlink = netlink.borrow_mut();
        for message in self.seen.get_mut() {
            let id = id(message).unwrap_or_default();
            let body = request(message.body[0], CONNECTED, id);
            match netlink.change(Request::new(SOCK_DESTROY, 0).payload(&body)) {
                // Closed meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                result => result.map_err(ItemError::io("close a socket"))?,
            }
        }
        Ok(())
    }

    fn check(&self, _: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        ItemError::compare("", &new.value)
    }
}
