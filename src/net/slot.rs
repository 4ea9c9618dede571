//! A slot: a network namespace of its own with a tap for a VMM, a cable to the service's namespace,
//! addresses, and rules.
//!
//! ```text
//! made (nothing passes) --attach--> a VM's, closed --policy--> a sandbox's --drop--> gone
//! ```
//!
//! Nothing of a slot has a name that outlives it. The namespace lasts as long as somebody is in it
//! or holds it: this service by descriptors, the VMM by running in it. When both are gone the kernel
//! takes it down, and with it the tap, the cable with both its ends, routes and rules. A service that
//! was killed finds the slots of the VMs it takes back through their processes. A slot serves one
//! VM and is then given up: no connection and no rule of one VM is ever met by another.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guest_agent::netlink::Netlink;
use snapshotter::tap;

use super::cidr::Cidr;
use super::links::Links;
use super::nft::{self, Count};
use super::plan::{Addresses, CABLE_PREFIX, CABLE_PREFIX_V6, GUEST_PREFIX, GUEST_PREFIX_V6, Plan};
use super::policy::Policy;
use super::rules::{self, TABLE, TAP, UP};

const ANY: (std::net::IpAddr, u8) = (std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
const ANY_V6: (std::net::IpAddr, u8) = (std::net::IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);

/// Hardware addresses of a cable's ends, the service's and the slot's: nobody else is on it. With
/// each end told the other's, nobody asks, which for IPv6 would need yet another address.
const HERE: [u8; 6] = [0x02, 0x72, 0x74, 0, 0, 1];
const THERE: [u8; 6] = [0x02, 0x72, 0x74, 0, 0, 2];
/// Hardware address of every guest's gateway: a workspace that comes back from a pause remembers it,
/// and would send to the old one for seconds.
const GATEWAY: [u8; 6] = [0x02, 0x72, 0x74, 0, 0, 3];

/// What every part of a slot can reach: also its name server, which lives in a task.
#[derive(Debug)]
pub struct Shared {
    /// What it is called.
    pub addresses: Addresses,
    netlink: Mutex<Netlink>,
    policy: Mutex<Policy>,
}

/// A slot.
#[derive(Debug)]
pub struct Slot {
    shared: Arc<Shared>,
    netns: OwnedFd,
    /// Sockets of the name server, until it is started.
    sockets: Option<NameSockets>,
}

/// Where a slot's name server listens.
#[derive(Debug)]
pub struct NameSockets {
    /// Short questions.
    pub udp: std::net::UdpSocket,
    /// Long answers.
    pub tcp: std::net::TcpListener,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{what}: {e}"))
}

/// Sets a switch of the network of this thread's namespace.
pub(super) fn sysctl(path: &str, value: &str) -> io::Result<()> {
    std::fs::write(format!("/proc/sys/net/{path}"), value)
        .map_err(|e| io::Error::new(e.kind(), format!("net/{path}: {e}")))
}

impl Slot {
    /// Makes slot number `number`. Blocks for some milliseconds; called in the service's namespace.
    ///
    /// # Errors
    /// What could not be made; nothing is left of it. `AlreadyExists` when the VM that had the
    /// number is not gone yet.
    pub fn make(plan: &Plan, number: u16, denied: &[Cidr]) -> io::Result<Self> {
        let v6 = plan.v6.is_some();
        let prepare = || {
            let inside = Inside { links: Links::open()?, netlink: nft::open()? };
            tap::create(TAP).map_err(failed("tap"))?;
            sysctl("ipv4/ip_forward", "1")?;
            if v6 {
                sysctl("ipv6/conf/all/forwarding", "1")?;
            } else {
                // A kernel without IPv6 has no such switch.
                let _ = sysctl("ipv6/conf/all/disable_ipv6", "1");
                let _ = sysctl("ipv6/conf/default/disable_ipv6", "1");
            }
            Ok(inside)
        };
        let (netns, mut inside) = tap::new_namespace(prepare)?;
        let name = plan.link(number);
        // The name is the claim to the number: only one cable can have it.
        let mut links = Links::open()?;
        links.cable((&name, HERE), (UP, THERE), netns.as_fd()).map_err(|e| {
            match e.raw_os_error() {
                Some(nix::libc::EEXIST) => io::ErrorKind::AlreadyExists.into(),
                _ => failed("cable")(e),
            }
        })?;
        // From here on a failure closes the namespace, which takes the cable with it.
        inside.addresses(plan, number)?;
        outside(&mut links, plan, number, &name)?;
        rules::base(plan, number, denied).commit(&mut inside.netlink)?;
        Self::with(netns, inside.netlink, plan.addresses(number), Policy::closed())
    }

    /// Finds the slot of a VMM that an earlier service started: it runs in it.
    ///
    /// # Errors
    /// The process or its namespace cannot be looked into.
    pub fn adopt(pid: i32, addresses: Addresses, policy: &Policy) -> io::Result<Self> {
        let netns: OwnedFd = File::open(format!("/proc/{pid}/ns/net"))?.into();
        let netlink = tap::inside(&netns, nft::open)?;
        let slot = Self::with(netns, netlink, addresses, policy.clone())?;
        // The service may have been killed between noting a change and making it.
        slot.set_policy(policy)?;
        Ok(slot)
    }

    fn with(
        netns: OwnedFd,
        netlink: Netlink,
        addresses: Addresses,
        policy: Policy,
    ) -> io::Result<Self> {
        let at = (addresses.gateway, 53);
        let sockets = tap::inside(&netns, || {
            let udp = std::net::UdpSocket::bind(at)?;
            let tcp = std::net::TcpListener::bind(at)?;
            udp.set_nonblocking(true)?;
            tcp.set_nonblocking(true)?;
            Ok(NameSockets { udp, tcp })
        });
        let sockets = Some(sockets.map_err(failed("name server"))?);
        let (netlink, policy) = (Mutex::new(netlink), Mutex::new(policy));
        let shared = Arc::new(Shared { addresses, netlink, policy });
        Ok(Self { shared, netns, sockets })
    }

    /// What it is called, and what else its parts share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The sockets of its name server, once.
    pub fn take_sockets(&mut self) -> Option<NameSockets> {
        self.sockets.take()
    }

    /// Where a VMM finds its namespace for as long as this slot is held.
    pub fn netns_path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_raw_fd()).into()
    }

    /// Ties it to the VM with this hardware address.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attach(&self, mac: [u8; 6]) -> io::Result<()> {
        let addresses = &self.shared.addresses;
        rules::attached(addresses, mac).commit(&mut lock(&self.shared.netlink))?;
        tap::inside(&self.netns, || {
            let mut links = Links::open()?;
            let index = links.index(TAP)?;
            links.neighbour(index, addresses.ipv4.into(), mac)?;
            match addresses.ipv6 {
                Some(ipv6) => links.neighbour(index, ipv6.into(), mac),
                None => Ok(()),
            }
        })
        .map_err(failed("neighbour"))
    }

    /// See [`Shared::set_policy`].
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_policy(&self, policy: &Policy) -> io::Result<()> {
        self.shared.set_policy(policy)
    }
}

impl Shared {
    /// Replaces what may be reached. Connections made under the old policy have to pass the new one.
    ///
    /// # Errors
    /// What the kernel says; the old policy stays.
    pub fn set_policy(&self, policy: &Policy) -> io::Result<()> {
        let mut netlink = lock(&self.netlink);
        rules::policy(policy).commit(&mut netlink)?;
        nft::forget_connections(&mut netlink).map_err(failed("connections"))?;
        *lock(&self.policy) = policy.clone();
        Ok(())
    }

    /// What may be reached now.
    pub fn policy(&self) -> Policy {
        lock(&self.policy).clone()
    }

    /// Lets the guest reach addresses of a name that it may.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn allow_names(&self, addresses: &[std::net::IpAddr], timeout: Duration) -> io::Result<()> {
        rules::names(addresses, timeout).commit(&mut lock(&self.netlink))
    }

    /// What passed and what did not.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn counters(&self) -> io::Result<Vec<(String, Count)>> {
        nft::counters(&mut lock(&self.netlink), TABLE)
    }
}

/// Sockets into a namespace that is being furnished.
struct Inside {
    links: Links,
    netlink: Netlink,
}

impl Inside {
    fn addresses(&mut self, plan: &Plan, number: u16) -> io::Result<()> {
        let links = &mut self.links;
        let (here, there) = plan.cable(number);
        let addresses = plan.addresses(number);
        links.up(1).map_err(failed("loopback"))?;
        let tap = links.index(TAP)?;
        links.set_mac(tap, GATEWAY).map_err(failed("tap's hardware address"))?;
        links.up_bare(tap).map_err(failed("tap"))?;
        links.address(tap, addresses.gateway.into(), GUEST_PREFIX).map_err(failed("gateway"))?;
        let up = links.index(UP)?;
        links.up_bare(up).map_err(failed("cable"))?;
        links.address(up, there.into(), CABLE_PREFIX).map_err(failed("cable's address"))?;
        links.neighbour(up, here.into(), HERE).map_err(failed("cable"))?;
        links.route(up, ANY, here.into()).map_err(failed("default route"))?;
        if let (Some(gateway), Some((here, there))) = (addresses.gateway_v6, plan.cable_v6(number))
        {
            links.address(tap, gateway.into(), GUEST_PREFIX_V6).map_err(failed("gateway"))?;
            links.address(up, there.into(), CABLE_PREFIX_V6).map_err(failed("cable's address"))?;
            links.neighbour(up, here.into(), HERE).map_err(failed("cable"))?;
            links.route(up, ANY_V6, here.into()).map_err(failed("default route"))?;
        }
        Ok(())
    }
}

/// The service's end of the cable.
fn outside(links: &mut Links, plan: &Plan, number: u16, name: &str) -> io::Result<()> {
    let index = links.index(name)?;
    links.up_bare(index).map_err(failed("cable"))?;
    let (here, there) = plan.cable(number);
    let addresses = plan.addresses(number);
    links.address(index, here.into(), CABLE_PREFIX).map_err(failed("cable's address"))?;
    links.neighbour(index, there.into(), THERE).map_err(failed("cable"))?;
    let guest = (addresses.ipv4.into(), 32);
    links.route(index, guest, there.into()).map_err(failed("route to the guest"))?;
    sysctl(&format!("ipv4/conf/{name}/forwarding"), "1")?;
    if let (Some(ipv6), Some((here, there))) = (addresses.ipv6, plan.cable_v6(number)) {
        links.address(index, here.into(), CABLE_PREFIX_V6).map_err(failed("cable's address"))?;
        links.neighbour(index, there.into(), THERE).map_err(failed("cable"))?;
        links
            .route(index, (ipv6.into(), 128), there.into())
            .map_err(failed("route to the guest"))?;
        super::host::forward_v6(name)?;
    }
    Ok(())
}
