//! The NIC: hardware address, addresses, routes, name servers.
//!
//! The link stays up, because taking it down makes the kernel wait for every processor: with the
//! last address of a kind its routes go, and a new hardware address empties the neighbour table.
//!
//! Most machines come without any address and want none. Then two short questions take the place
//! of listing addresses and routes: without an address there is no gateway to be reached.

mod link;

pub use link::{Links, Seen};

use super::proof::{Context, Item, ItemError, Reading};
use super::ready::SharedNetlink;
use super::{ready, write};
use crate::agent::Agent;
use crate::netlink::{Message, Netlink, Request, u32_at};
use link::Link;
use nix::sys::socket::SockProtocol;
use std::cell::{Cell, RefMut};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::rc::Rc;

/// The interface of a machine that has one.
pub const DEFAULT_INTERFACE: &str = "eth0";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Sizes of the kernel's ifinfomsg, ifaddrmsg and rtmsg.
const IFINFO: usize = 16;
const IFADDR: usize = 8;
const RTMSG: usize = 12;
const IFA_F_NODAD: u8 = 0x02;
/// Switches of IPv6 on one link.
const IPV6: &str = "/proc/sys/net/ipv6/conf";

/// The item.
#[derive(Debug)]
pub struct Network {
    wanted: Wanted,
    /// The link as last read.
    seen: Cell<Option<Seen>>,
    /// How it was when the machine was frozen, until that was told.
    frozen: Cell<Option<Seen>>,
    links: io::Result<Rc<Links>>,
    netlink: io::Result<SharedNetlink>,
}

/// The request's settings, understood.
#[derive(Debug, Default)]
pub struct Wanted {
    interface: String,
    mac: Option<[u8; 6]>,
    addresses: Vec<(IpAddr, u8)>,
    gateways: Vec<IpAddr>,
    resolv_conf: Option<String>,
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    // The lowest bit of the first byte would make it a group's address.
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

fn parse_cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let prefix: u8 = prefix.parse().ok()?;
    (prefix <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, prefix))
}

impl Wanted {
    /// Understands a request.
    ///
    /// # Errors
    /// What in it cannot be an address.
    pub fn parse(request: &crate::wire::IdentityRequest) -> Result<Self, String> {
        let interface = request.interface.clone().unwrap_or_else(|| DEFAULT_INTERFACE.to_owned());
        let mut wanted = Self { interface, ..Self::default() };
        if let Some(mac) = &request.mac {
            let mac = parse_mac(mac).ok_or_else(|| format!("mac {mac:?} is no station's"))?;
            wanted.mac = Some(mac);
            if request.ipv6.is_some() {
                wanted.addresses.push(link_local(mac));
            }
        }
        let v4 = request.ipv4.as_ref().map(|c| (&c.cidr, &c.gateway, true));
        let v6 = request.ipv6.as_ref().map(|c| (&c.cidr, &c.gateway, false));
        for (cidr, gateway, is_v4) in v4.into_iter().chain(v6) {
            let address = parse_cidr(cidr).filter(|(address, _)| address.is_ipv4() == is_v4);
            wanted.addresses.push(address.ok_or_else(|| format!("{cidr:?} is no address/prefix"))?);
            if let Some(text) = gateway {
                let gateway = text.parse().ok().filter(|g: &IpAddr| g.is_ipv4() == is_v4);
                wanted.gateways.push(gateway.ok_or_else(|| format!("gateway {text:?}"))?);
            }
        }
        if !request.dns.is_empty() {
            let mut text = String::new();
            for server in &request.dns {
                let server: IpAddr = server.parse().map_err(|_| format!("dns {server:?}"))?;
                // Writing to a string cannot fail.
                let _ = writeln!(text, "nameserver {server}");
            }
            wanted.resolv_conf = Some(text);
        }
        if wanted.mac.is_none() && !wanted.addresses.is_empty() {
            return Err("addresses without a mac".to_owned());
        }
        Ok(wanted)
    }

    /// What [`now`] says where these settings are in effect.
    pub fn description(&self) -> String {
        describe(
            true,
            self.mac.unwrap_or_default(),
            self.addresses.clone(),
            self.gateways.clone(),
            self.resolv_conf.as_deref().unwrap_or(""),
        )
    }
}

/// The settings in effect.
///
/// # Errors
/// There is no link, or the kernel does not say.
pub fn now(agent: &Agent) -> Result<String, ItemError> {
    let interface = DEFAULT_INTERFACE.to_owned();
    let wanted = Wanted { interface, resolv_conf: Some(String::new()), ..Wanted::default() };
    Ok(Network::with(agent, wanted, None).look_closely(agent)?.value)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|v6| Ipv6Addr::from(v6).into())
}

fn describe(
    up: bool,
    mac: [u8; 6],
    mut addresses: Vec<(IpAddr, u8)>,
    mut gateways: Vec<IpAddr>,
    resolv_conf: &str,
) -> String {
    addresses.sort_unstable();
    gateways.sort_unstable();
    let addresses: Vec<String> = addresses.iter().map(|(a, p)| format!("{a}/{p}")).collect();
    let gateways: Vec<String> = gateways.iter().map(ToString::to_string).collect();
    let state = if up { "up" } else { "down" };
    let (mac, addresses) = (hex::encode(mac), addresses.join(" "));
    format!("{state} {mac} [{addresses}] via [{}] {resolv_conf:?}", gateways.join(" "))
}

fn ifinfo(index: u32, flags: i32, change: i32) -> [u8; IFINFO] {
    let mut body = [0; IFINFO];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&change.to_ne_bytes());
    body
}

/// All of the link's addresses, as messages.
fn addresses(netlink: &mut Netlink, index: u32) -> io::Result<Vec<Message>> {
    let dump = Request::new(libc::RTM_GETADDR, libc::NLM_F_DUMP).payload(&[0; IFADDR]);
    let mut messages = netlink.ask(dump)?;
    messages.retain(|m| u32_at(&m.body, 4) == Some(index));
    Ok(messages)
}

/// The address IPv6 needs on every link, made from the hardware address.
fn link_local(mac: [u8; 6]) -> (IpAddr, u8) {
    let [a, b, c, d, e, f] = mac;
    let bytes = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    (Ipv6Addr::from(bytes).into(), 64)
}

fn raise(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    let body = ifinfo(index, libc::IFF_UP, libc::IFF_UP);
    netlink.change(Request::new(libc::RTM_NEWLINK, 0).payload(&body))
}

/// Brings the NIC of a template up, so that its clones need not. A template without one is fine.
///
/// # Errors
/// There is one that does not come up.
pub fn prepare() -> io::Result<()> {
    let link = match Links::open()?.get(DEFAULT_INTERFACE) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
        result => result?,
    };
    // Without addresses of the kernel's own making there is nothing to replace in a clone.
    ipv6(DEFAULT_INTERFACE, "addr_gen_mode", "1")?;
    if link.up {
        return Ok(());
    }
    raise(&mut Netlink::open_small(SockProtocol::NetlinkRoute)?, link.index)
}

/// Sets one of IPv6's switches of a link; a kernel without IPv6 has none.
fn ipv6(interface: &str, switch: &str, value: &str) -> io::Result<()> {
    match fs::write(format!("{IPV6}/{interface}/{switch}"), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn address_and_prefix(message: &Message) -> Option<(IpAddr, u8)> {
    let prefix = *message.body.get(1)?;
    // For a peer-to-peer link the local address is the one that is ours.
    let find = |wanted: u16| message.attributes(IFADDR).find(|(kind, _)| *kind == wanted);
    let (_, bytes) = find(libc::IFA_LOCAL).or_else(|| find(libc::IFA_ADDRESS))?;
    Some((address_of(bytes)?, prefix))
}

fn change_address(netlink: &mut Netlink, index: u32, address: (IpAddr, u8)) -> io::Result<()> {
    let (address, prefix) = address;
    // The address is the host's choice and unique: nothing has to be probed for.
    let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
    let local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let scope = if local { libc::RT_SCOPE_LINK } else { libc::RT_SCOPE_UNIVERSE };
    let mut body = vec![family(address), prefix, flags, scope];
    body.extend(index.to_ne_bytes());
    let bytes = octets(address);
    let create = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    let request = Request::new(libc::RTM_NEWADDR, create)
        .payload(&body)
        .attribute(libc::IFA_LOCAL, &bytes)
        .attribute(libc::IFA_ADDRESS, &bytes);
    netlink.change(request)
}

fn rtmsg(family: u8) -> [u8; RTMSG] {
    let (table, protocol) = (libc::RT_TABLE_MAIN, libc::RTPROT_STATIC);
    let (scope, kind) = (libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST);
    [family, 0, 0, 0, table, protocol, scope, kind, 0, 0, 0, 0]
}

/// Default gateways over this link.
fn gateways(netlink: &mut Netlink, index: u32) -> io::Result<Vec<IpAddr>> {
    let dump = Request::new(libc::RTM_GETROUTE, libc::NLM_F_DUMP).payload(&[0; RTMSG]);
    let messages = netlink.ask(dump)?;
    Ok(messages
        .iter()
        .filter(|m| m.body.get(1) == Some(&0) && m.body.get(4) == Some(&libc::RT_TABLE_MAIN))
        .filter(|m| {
            let over = |(kind, value): (u16, &[u8])| {
                kind == libc::RTA_OIF && u32_at(value, 0) == Some(index)
            };
            m.attributes(RTMSG).any(over)
        })
        .filter_map(|m| {
            let (_, bytes) = m.attributes(RTMSG).find(|(kind, _)| *kind == libc::RTA_GATEWAY)?;
            address_of(bytes)
        })
        .collect())
}

impl Network {
    /// The item for settings that were understood.
    pub fn new(agent: &Agent, wanted: Wanted) -> Self {
        let frozen = ready::link(agent).filter(|_| wanted.interface == DEFAULT_INTERFACE);
        Self::with(agent, wanted, frozen)
    }

    fn with(agent: &Agent, wanted: Wanted, frozen: Option<Seen>) -> Self {
        let (links, netlink) = (ready::links(agent), ready::route(agent));
        Self { wanted, seen: Cell::new(None), frozen: Cell::new(frozen), links, netlink }
    }

    fn links(&self) -> io::Result<&Links> {
        self.links.as_deref().map_err(ready::again)
    }

    fn netlink(&self) -> io::Result<RefMut<'_, Netlink>> {
        self.netlink.as_ref().map(|netlink| netlink.borrow_mut()).map_err(ready::again)
    }

    /// The link now, or as it was when the machine was frozen: nothing in it has run since.
    fn look(&self) -> io::Result<Seen> {
        if let Some(frozen) = self.frozen.take() {
            return Ok(frozen);
        }
        let links = self.links()?;
        let link = links.get(&self.wanted.interface)?;
        // With addresses just set there is no point in asking whether there are any.
        let bare = self.wanted.addresses.is_empty() && links.without_addresses(link.index)?;
        Ok(Seen { link, bare })
    }

    fn look_closely(&self, agent: &Agent) -> Result<Reading, ItemError> {
        let io = || ItemError::io(format!("read the state of {}", self.wanted.interface));
        let seen = self.look().map_err(io())?;
        self.seen.set(Some(seen));
        let Seen { link: Link { index, up, mac }, bare } = seen;
        let (addresses, gateways) = if bare {
            (Vec::new(), Vec::new())
        } else {
            let mut netlink = self.netlink().map_err(io())?;
            let messages = addresses(&mut netlink, index).map_err(io())?;
            let gateways = gateways(&mut netlink, index).map_err(io())?;
            (messages.iter().filter_map(address_and_prefix).collect(), gateways)
        };
        let resolv_conf = match &self.wanted.resolv_conf {
            Some(_) => write::read(&agent.path(RESOLV_CONF))?,
            None => String::new(),
        };
        let text = describe(up, mac, addresses, gateways, &resolv_conf);
        let mut reading = Reading::of(text);
        reading.details.insert("interface".to_owned(), self.wanted.interface.clone());
        Ok(reading)
    }

    fn set(&self) -> Result<(), (String, io::Error)> {
        let at = |what: &str| {
            let what = format!("{what} {}", self.wanted.interface);
            move |e| (what, e)
        };
        let name = &self.wanted.interface;
        let links = self.links().map_err(at("open a socket for"))?;
        let Seen { link: Link { index, up, .. }, bare } = match self.seen.get() {
            Some(seen) => seen,
            None => Seen { link: links.get(name).map_err(at("find"))?, bare: false },
        };
        let mut netlink = self.netlink().map_err(at("open netlink for"))?;
        if !bare {
            for message in addresses(&mut netlink, index).map_err(at("list addresses of"))? {
                let delete = Request::new(libc::RTM_DELADDR, 0).payload(&message.body);
                netlink.change(delete).map_err(at("remove an address of"))?;
            }
        }
        if let Some(mac) = self.wanted.mac {
            links.set_mac(name, mac).map_err(at("set the hardware address of"))?;
        }
        if up && self.wanted.addresses.is_empty() && self.wanted.gateways.is_empty() {
            return Ok(());
        }
        if !up {
            raise(&mut netlink, index).map_err(at("bring up"))?;
        }
        for address in &self.wanted.addresses {
            let added = match change_address(&mut netlink, index, *address) {
                // Somebody in the guest switched IPv6 off.
                Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
                    ipv6(name, "disable_ipv6", "0").map_err(at("allow IPv6 on"))?;
                    change_address(&mut netlink, index, *address)
                }
                added => added,
            };
            added.map_err(at("add an address to"))?;
        }
        for gateway in &self.wanted.gateways {
            let create = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
            let route = Request::new(libc::RTM_NEWROUTE, create)
                .payload(&rtmsg(family(*gateway)))
                .attribute(libc::RTA_GATEWAY, &octets(*gateway))
                .attribute(libc::RTA_OIF, &index.to_ne_bytes());
            netlink.change(route).map_err(at("add a default route over"))?;
        }
        Ok(())
    }
}

impl Item for Network {
    fn name(&self) -> &'static str {
        "network"
    }

    fn not_applicable(&self, _: &Context<'_>) -> Option<String> {
        self.wanted.mac.is_none().then(|| "the request names no hardware address".to_owned())
    }

    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError> {
        self.look_closely(context.agent)
    }

    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        self.set().map_err(|(what, source)| ItemError::Io { what, source })?;
        match &self.wanted.resolv_conf {
            Some(text) => write::update(&context.agent.path(RESOLV_CONF), text, 0o644),
            None => Ok(()),
        }
    }

    fn check(&self, _: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        ItemError::compare(&self.wanted.description(), &new.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood() {
        assert_eq!(parse_mac("02:00:00:aB:00:01"), Some([2, 0, 0, 0xab, 0, 1]));
        for bad in
            ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "03:00:00:00:00:01", "0g:0:0:0:0:0"]
        {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
        assert_eq!(parse_cidr("10.0.0.2/30").unwrap().1, 30);
        assert!(parse_cidr("10.0.0.2").is_none() && parse_cidr("10.0.0.2/33").is_none());
        assert!(parse_cidr("fd00::1/64").is_some() && parse_cidr("fd00::1/129").is_none());
    }
}
