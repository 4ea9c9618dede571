//! Links, addresses, routes and neighbours by netlink, in the namespace of the socket.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use guest_agent::netlink::{Attributes, Netlink, Request, u32_at};
use nix::libc;
use nix::sys::socket::SockProtocol;

/// In `<linux/veth.h>`.
const VETH_INFO_PEER: u16 = 1;
/// In `<linux/if_link.h>`.
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_NONE: u8 = 1;
const IFA_F_NODAD: u8 = 2;
const NUD_PERMANENT: u16 = 0x80;
const IFINFO: usize = 16;
const RTMSG: usize = 12;

/// A socket for links and routes.
#[derive(Debug)]
pub struct Links(Netlink);

/// A network that can be reached, and by which link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where to: an address and how many of its bits count.
    pub to: (IpAddr, u8),
    /// Number of the link, where it names one.
    pub link: Option<u32>,
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

fn text(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn ifinfo(index: u32, up: bool) -> [u8; IFINFO] {
    let mut body = [0; IFINFO];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    if up {
        body[8..12].copy_from_slice(&libc::IFF_UP.to_ne_bytes());
        body[12..16].copy_from_slice(&libc::IFF_UP.to_ne_bytes());
    }
    body
}

/// Keeps the kernel from giving a link an IPv6 address of its own making.
fn no_own_addresses() -> Attributes {
    let inet6 = Attributes::new().put(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_NONE]);
    Attributes::new().nest(libc::AF_INET6 as u16, &inet6)
}

impl Links {
    /// Opens a socket in this thread's namespace.
    pub fn open() -> io::Result<Self> {
        Netlink::open(SockProtocol::NetlinkRoute).map(Self)
    }

    /// Makes a cable: one end here, the other in `netns`; each a name and a hardware address.
    pub fn cable(
        &mut self,
        here: (&str, [u8; 6]),
        there: (&str, [u8; 6]),
        netns: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let fd = netns.as_raw_fd().to_ne_bytes();
        let far = Attributes::new()
            .fixed(&ifinfo(0, false))
            .put(libc::IFLA_IFNAME, &text(there.0))
            .put(libc::IFLA_ADDRESS, &there.1)
            .put(libc::IFLA_NET_NS_FD, &fd);
        let info = Attributes::new()
            .put(libc::IFLA_INFO_KIND, b"veth")
            .nest(libc::IFLA_INFO_DATA, &Attributes::new().nest(VETH_INFO_PEER, &far));
        let request = Request::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
            .payload(&ifinfo(0, false))
            .attribute(libc::IFLA_IFNAME, &text(here.0))
            .attribute(libc::IFLA_ADDRESS, &here.1)
            .nested(libc::IFLA_LINKINFO, &info);
        self.0.change(request)
    }

    /// Number of the link of this name.
    pub fn index(&mut self, name: &str) -> io::Result<u32> {
        let request = Request::new(libc::RTM_GETLINK, 0)
            .payload(&ifinfo(0, false))
            .attribute(libc::IFLA_IFNAME, &text(name));
        let answer = self.0.ask(request)?;
        let index = answer.first().and_then(|m| u32_at(&m.body, 4));
        index.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no link {name}")))
    }

    /// Names and numbers of all links.
    pub fn all(&mut self) -> io::Result<Vec<(String, u32)>> {
        let request = Request::new(libc::RTM_GETLINK, libc::NLM_F_DUMP).payload(&ifinfo(0, false));
        let answers = self.0.ask(request)?;
        Ok(answers
            .iter()
            .filter_map(|m| {
                let (_, name) = m.attributes(IFINFO).find(|(k, _)| *k == libc::IFLA_IFNAME)?;
                let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
                Some((name, u32_at(&m.body, 4)?))
            })
            .collect())
    }

    /// Sets a link up.
    pub fn up(&mut self, index: u32) -> io::Result<()> {
        self.0.change(Request::new(libc::RTM_NEWLINK, 0).payload(&ifinfo(index, true)))
    }

    /// Gives a link this hardware address.
    pub fn set_mac(&mut self, index: u32, mac: [u8; 6]) -> io::Result<()> {
        let request = Request::new(libc::RTM_NEWLINK, 0)
            .payload(&ifinfo(index, false))
            .attribute(libc::IFLA_ADDRESS, &mac);
        self.0.change(request)
    }

    /// Sets a link up that gets no addresses but those it is given.
    pub fn up_bare(&mut self, index: u32) -> io::Result<()> {
        // First, and by itself: flags come before it in one message.
        let request = Request::new(libc::RTM_NEWLINK, 0)
            .payload(&ifinfo(index, false))
            .nested(libc::IFLA_AF_SPEC, &no_own_addresses());
        match self.0.change(request) {
            // A kernel without IPv6.
            Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            done => done?,
        }
        self.up(index)
    }

    /// Gives a link an address.
    pub fn address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
        let mut body = vec![family(address), prefix, flags, libc::RT_SCOPE_UNIVERSE];
        body.extend(index.to_ne_bytes());
        let bytes = octets(address);
        let request = Request::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
            .payload(&body)
            .attribute(libc::IFA_LOCAL, &bytes)
            .attribute(libc::IFA_ADDRESS, &bytes);
        self.0.change(request)
    }

    /// Adds a route over a gateway.
    pub fn route(&mut self, index: u32, to: (IpAddr, u8), gateway: IpAddr) -> io::Result<()> {
        let (table, protocol) = (libc::RT_TABLE_MAIN, libc::RTPROT_STATIC);
        let (scope, kind) = (libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST);
        let body = [family(gateway), to.1, 0, 0, table, protocol, scope, kind, 0, 0, 0, 0];
        let mut request =
            Request::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_EXCL).payload(&body);
        if to.1 > 0 {
            request = request.attribute(libc::RTA_DST, &octets(to.0));
        }
        let request = request
            .attribute(libc::RTA_GATEWAY, &octets(gateway))
            .attribute(libc::RTA_OIF, &index.to_ne_bytes());
        self.0.change(request)
    }

    /// Every route of the main table.
    pub fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut found = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut body = [0; RTMSG];
            body[0] = family as u8;
            let dump = Request::new(libc::RTM_GETROUTE, libc::NLM_F_DUMP).payload(&body);
            for answer in self.0.ask(dump)? {
                let [_, prefix, _, _, table, _, _, kind, ..] = answer.body[..] else { continue };
                if table != libc::RT_TABLE_MAIN || kind != libc::RTN_UNICAST {
                    continue;
                }
                let find = |wanted: u16| {
                    answer.attributes(RTMSG).find(|(k, _)| *k == wanted).map(|(_, value)| value)
                };
                let any: IpAddr = if family == libc::AF_INET {
                    std::net::Ipv4Addr::UNSPECIFIED.into()
                } else {
                    std::net::Ipv6Addr::UNSPECIFIED.into()
                };
                let to = find(libc::RTA_DST).and_then(address_of).unwrap_or(any);
                let link = find(libc::RTA_OIF).and_then(|bytes| u32_at(bytes, 0));
                found.push(Route { to: (to, prefix), link });
            }
        }
        Ok(found)
    }

    /// Ties an address to a hardware address, whatever anybody answers to who-has.
    pub fn neighbour(&mut self, index: u32, address: IpAddr, mac: [u8; 6]) -> io::Result<()> {
        let mut body = vec![family(address), 0, 0, 0];
        body.extend(index.to_ne_bytes());
        body.extend(NUD_PERMANENT.to_ne_bytes());
        body.extend([0, libc::RTN_UNICAST]);
        let request = Request::new(libc::RTM_NEWNEIGH, libc::NLM_F_CREATE | libc::NLM_F_REPLACE)
            .payload(&body)
            .attribute(libc::NDA_DST, &octets(address))
            .attribute(libc::NDA_LLADDR, &mac);
        self.0.change(request)
    }
}
