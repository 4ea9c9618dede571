//! What the service changes in its own network namespace, which is the host's unless it runs in a
//! container: one nftables table, and forwarding on the links that lead out, where it was off.
//!
//! All of it is noted before it is done ([`note`]).

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use guest_agent::netlink::Netlink;

use super::cidr::Cidr;
use super::leftover;
use super::links::{Links, Route};
use super::nft::{self, Batch, Count, Family, Hook, Rule, Verdict};
use super::note::{self, Note, namespace, others};
use super::plan::{CANDIDATES, PREFIX, Plan};
use super::slot::sysctl;

const ICMP_V6: u8 = 58;
const NEIGHBOUR: [u8; 2] = [135, 136];
/// Counters of what the table dropped.
pub const COUNTERS: &[&str] = &["host", "between"];

/// The host's side of all slots.
#[derive(Debug)]
pub struct Host {
    /// Who has which address.
    pub plan: Plan,
    path: PathBuf,
    note: Note,
}

fn read_switch(path: &str) -> io::Result<bool> {
    Ok(fs::read_to_string(format!("/proc/sys/net/{path}"))?.trim() == "1")
}

/// Lets IPv6 packets that come in over `link` be passed on. The switch of all links would also stop
/// the host from listening to its routers; the one of a single link is not in every kernel.
pub(super) fn forward_v6(link: &str) -> io::Result<()> {
    if read_switch("ipv6/conf/all/forwarding")? {
        return Ok(());
    }
    sysctl(&format!("ipv6/conf/{link}/force_forwarding"), "1")
}

/// Links that lead out, and the switches to let packets through that come in over them.
struct Outside {
    v4: BTreeSet<String>,
    v6: BTreeSet<String>,
}

impl Outside {
    fn look(links: &mut Links, routes: &[Route], own: &str) -> io::Result<Self> {
        let names = links.all()?;
        let of = |v4: bool| {
            let routes =
                routes.iter().filter(move |r| r.to.0.is_ipv4() == v4 && !is_local(&r.to.0));
            let named =
                |index: u32| names.iter().find(|(_, i)| *i == index).map(|(n, _)| n.clone());
            let found = routes.filter_map(|r| r.link).filter_map(named);
            found.filter(|n| n != "lo" && !n.starts_with(own)).collect()
        };
        Ok(Self { v4: of(true), v6: of(false) })
    }

    /// IPv6 can be passed on here, over some link.
    fn has_v6(&self) -> bool {
        let all = read_switch("ipv6/conf/all/forwarding").unwrap_or(false);
        let single = |n: &String| {
            Path::new(&format!("/proc/sys/net/ipv6/conf/{n}/force_forwarding")).exists()
        };
        !self.v6.is_empty() && (all || self.v6.iter().all(single))
    }

    /// Switches that are off and have to be on.
    fn switches(&self, v6: bool) -> io::Result<BTreeSet<String>> {
        let mut wanted = BTreeSet::new();
        if !read_switch("ipv4/ip_forward")? {
            wanted.extend(self.v4.iter().map(|n| format!("ipv4/conf/{n}/forwarding")));
        }
        if v6 && !read_switch("ipv6/conf/all/forwarding")? {
            wanted.extend(self.v6.iter().map(|n| format!("ipv6/conf/{n}/force_forwarding")));
        }
        let off = |switch: &String| matches!(read_switch(switch), Ok(false));
        Ok(wanted.into_iter().filter(off).collect())
    }
}

fn is_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_multicast(),
    }
}

/// A network that nobody here uses yet.
fn free_network(routes: &[Route]) -> io::Result<Ipv4Addr> {
    let taken = |candidate: &Ipv4Addr| {
        let network = Cidr::new((*candidate).into(), PREFIX);
        let others = routes.iter().filter(|r| r.to.1 > 0);
        others.map(|r| Cidr::new(r.to.0, r.to.1)).any(|r| r.overlaps(&network))
    };
    CANDIDATES.iter().find(|c| !taken(c)).copied().ok_or_else(|| {
        let message = "every network tried for sandboxes overlaps a route of this host; name a \
                       free one with --network";
        io::Error::new(io::ErrorKind::AddrInUse, message)
    })
}

impl Host {
    /// Puts the host's side in place, for the service whose data is in `home`.
    ///
    /// # Errors
    /// What could not be done; nothing is left of it but the note.
    pub fn set_up(home: &Path, note: &Path, network: Option<Ipv4Addr>) -> io::Result<Self> {
        let path = note.to_owned();
        let lock = note::lock(path.parent().unwrap_or(Path::new("/")))?;
        leftover::sweep(&path);
        let mut note = Note::read(&path)?;
        let here = namespace()?;
        if note.namespace != here {
            // Of a container that is no more.
            note = Note { namespace: here, ..Note::default() };
        }
        note.home = home.canonicalize().unwrap_or_else(|_| home.to_owned());
        let home = note.home.to_string_lossy().into_owned();
        let own = Plan::new(&home, Ipv4Addr::UNSPECIFIED, false).link_prefix;
        let mut links = Links::open()?;
        let routes = links.routes()?;
        let outside = Outside::look(&mut links, &routes, &own)?;
        // With VMs of an earlier service still there, theirs is the plan.
        let survivors = links.all()?.iter().any(|(name, _)| name.starts_with(&own));
        let v4 = match (note.network, network) {
            (Some(noted), _) if survivors => noted,
            (_, Some(named)) => named,
            (noted, None) => match noted.filter(|n| !routes_overlap(&routes, *n)) {
                Some(noted) => noted,
                None => free_network(&routes)?,
            },
        };
        let v6 = if survivors { note.v6 } else { outside.has_v6() };
        let plan = Plan::new(&home, v4, v6);
        (note.network, note.v6) = (Some(v4), v6);
        note.table.clone_from(&plan.table);
        note.switches.extend(outside.switches(v6)?);
        // Those that another service here switched on are ours, too: the last to go switches off.
        note.switches.extend(others(&path).into_iter().flat_map(|other| other.switches));
        note.write(&path)?;
        let host = Self { plan, path, note };
        let done = host.put_in_place();
        drop(lock);
        if done.is_err() {
            host.take_down();
        }
        done.map(|()| host)
    }

    fn put_in_place(&self) -> io::Result<()> {
        self.table().commit(&mut nft::open()?)?;
        for switch in &self.note.switches {
            match sysctl(switch, "1") {
                // A link that went since it was noted.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(())
    }

    fn table(&self) -> Batch {
        let own = self.plan.link_prefix.as_str();
        let from = || Rule::new().from_links(own);
        let accept = |rule: Rule| rule.then(&Verdict::Accept);
        // Made if it is not there, so that it can be removed, so that it is new.
        let mut batch = Batch::new(&self.plan.table).table().delete_table().table();
        for counter in COUNTERS {
            batch = batch.counter(counter);
        }
        batch = batch
            .base_chain("input", Hook::Input, true)
            .rule("input", accept(from().of_known_connection()));
        for kind in NEIGHBOUR {
            let rule = from().family(Family::V6).transport(ICMP_V6).icmp_type(kind);
            batch = batch.rule("input", accept(rule));
        }
        batch = batch
            .rule("input", from().count("host").then(&Verdict::Drop))
            .base_chain("forward", Hook::Forward, true)
            .rule("forward", from().to_links(own).count("between").then(&Verdict::Drop))
            .rule("forward", accept(Rule::new().to_links(own).of_known_connection()))
            .rule("forward", Rule::new().to_links(own).then(&Verdict::Drop));
        // Forwarding is on for these because of sandboxes, and for nothing else.
        for (link, family) in self.note.switches.iter().filter_map(|s| switched_link(s)) {
            let rule = Rule::new().from_link(link).to_other_links(own).family(family);
            batch = batch.rule("forward", rule.then(&Verdict::Drop));
        }
        batch = batch.base_chain("postrouting", Hook::SourceNat, true);
        for (network, length) in [(Some(self.plan.v4), PREFIX), (self.plan.v6, 48)] {
            if let Some(network) = network {
                let rule = Rule::new().source_in(network.first(), length).to_other_links(own);
                batch = batch.rule("postrouting", rule.then(&Verdict::Masquerade));
            }
        }
        batch
    }

    /// What the table dropped.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn counters(&self, netlink: &mut Netlink) -> io::Result<Vec<(String, Count)>> {
        nft::counters(netlink, &self.plan.table)
    }

    /// Where its changes are noted.
    #[cfg(test)]
    pub(super) fn note_path(&self) -> &Path {
        &self.path
    }

    /// Undoes all of it. What cannot be undone is said, and stays noted.
    pub fn take_down(&self) {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let done = note::lock(folder).and_then(|_lock| self.note.undo(&self.path));
        if let Err(e) = done {
            tracing::error!("network: {e}");
        }
    }
}

fn routes_overlap(routes: &[Route], network: Ipv4Addr) -> bool {
    let network = Cidr::new(network.into(), PREFIX);
    routes.iter().filter(|r| r.to.1 > 0).any(|r| Cidr::new(r.to.0, r.to.1).overlaps(&network))
}

/// The link a switch is of, and the protocol.
fn switched_link(switch: &str) -> Option<(&str, Family)> {
    let (version, rest) = switch.split_once("/conf/")?;
    let (link, _) = rest.rsplit_once('/')?;
    Some((link, if version == "ipv4" { Family::V4 } else { Family::V6 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_names_its_link() {
        let (link, family) = switched_link("ipv4/conf/eth0.7/forwarding").unwrap();
        assert_eq!((link, family), ("eth0.7", Family::V4));
        assert_eq!(switched_link("ipv6/conf/wan/force_forwarding").unwrap().1, Family::V6);
        assert!(switched_link("ipv4/ip_forward").is_none());
    }

    #[test]
    fn a_network_in_use_is_not_taken() {
        let route = |text: &str| {
            let (address, length) = text.split_once('/').unwrap();
            Route { to: (address.parse().unwrap(), length.parse().unwrap()), link: Some(2) }
        };
        let none = [route("0.0.0.0/0"), route("192.0.2.0/24"), route("fd00::/64")];
        assert_eq!(free_network(&none).unwrap(), CANDIDATES[0]);
        let first = [route("0.0.0.0/0"), route("10.224.0.0/12")];
        assert_eq!(free_network(&first).unwrap(), CANDIDATES[1]);
        let all = [route("10.0.0.0/8"), route("172.16.0.0/12")];
        assert!(free_network(&all).unwrap_err().to_string().contains("--network"));
    }
}
