//! What is done when a machine is frozen so that its clones need not do it: handles are opened and
//! folders listed. The workload does not run between then and the identity, so nothing found here
//! can have changed; opening and listing are long ways through the kernel, and a clone would go
//! each of them for the first time.

use super::hooks;
use super::journald::Waiting;
use super::network::Links;
use crate::agent::Agent;
use crate::netlink::Netlink;
use nix::sys::socket::SockProtocol;
use std::io;
use std::path::PathBuf;

/// What is there already. An agent that was started anew has none of it, and makes it then.
#[derive(Debug, Default)]
pub struct Ready {
    hooks: Option<Vec<PathBuf>>,
    links: Option<Links>,
    sock_diag: Option<Netlink>,
    route: Option<Netlink>,
    pub(super) journald: Option<Waiting>,
}

/// Makes everything ready. What cannot be made now fails where it is used.
pub fn prepare(agent: &Agent) {
    let ready = Ready {
        hooks: Some(hooks::list(agent)),
        links: Links::open().ok(),
        sock_diag: Netlink::open(SockProtocol::NetlinkSockDiag).ok(),
        route: Netlink::open(SockProtocol::NetlinkRoute).ok(),
        // Only of a template; see there.
        journald: None,
    };
    *agent.ready.borrow_mut() = ready;
}

/// The hooks of `agent`'s machine.
pub fn hooks(agent: &Agent) -> Vec<PathBuf> {
    let known = agent.ready.borrow_mut().hooks.take();
    known.unwrap_or_else(|| hooks::list(agent))
}

/// To ask about links by.
pub fn links(agent: &Agent) -> io::Result<Links> {
    let known = agent.ready.borrow_mut().links.take();
    known.map_or_else(Links::open, Ok)
}

/// To ask about and change addresses and routes by, if it is open.
pub fn route(agent: &Agent) -> Option<Netlink> {
    agent.ready.borrow_mut().route.take()
}

/// The journal daemon that waits for its start, where there is one.
pub fn journald(agent: &Agent) -> Option<Waiting> {
    agent.ready.borrow_mut().journald.take()
}

/// To ask about sockets by.
pub fn sock_diag(agent: &Agent) -> io::Result<Netlink> {
    let known = agent.ready.borrow_mut().sock_diag.take();
    known.map_or_else(|| Netlink::open(SockProtocol::NetlinkSockDiag), Ok)
}
