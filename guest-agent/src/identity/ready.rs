//! What is done when a machine is frozen so that its clones need not do it: handles are opened and
//! folders listed. The workload does not run between then and the identity, so nothing found here
//! can have changed; opening, listing and closing are long ways through the kernel, and a clone would
//! go each of them for the first time. So what was opened stays open, too.

use super::hooks;
use super::journald::Waiting;
use super::network::{self, Links, Seen};
use super::sockets;
use crate::agent::Agent;
use crate::netlink::Netlink;
use nix::sys::socket::SockProtocol;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;

/// Names the item that is to fail here, for testing what happens then; in no ordinary template.
const FAULT_INJECTION: &str = "/etc/rethaw/fault-injection";

/// A netlink socket that whoever needs it shares.
pub type SharedNetlink = Rc<RefCell<Netlink>>;

/// What is there already. An agent that was started anew has none of it, and makes it then.
#[derive(Debug, Default)]
pub struct Ready {
    fault: Option<String>,
    hooks: Option<Vec<PathBuf>>,
    links: Option<Rc<Links>>,
    link: Option<Seen>,
    sock_diag: Option<SharedNetlink>,
    route: Option<SharedNetlink>,
    random: Option<Rc<File>>,
    attachment: Option<Attachment>,
    pub(super) journald: Option<Rc<Waiting>>,
}

/// Makes everything ready. What cannot be made now fails where it is used.
pub fn prepare(agent: &Agent) {
    let links = Links::open().ok().map(Rc::new);
    let ready = Ready {
        fault: Some(read_fault(agent)),
        hooks: Some(hooks::list(agent)),
        link: links.as_ref().and_then(|links| links.look().ok()),
        links,
        sock_diag: netlink(SockProtocol::NetlinkSockDiag).ok(),
        route: netlink(SockProtocol::NetlinkRoute).ok(),
        random: crate::entropy::open().ok().map(Rc::new),
        // Only of a workspace; see there.
        attachment: None,
        // Only of a template; see there.
        journald: None,
    };
    *agent.ready.borrow_mut() = ready;
}

/// How a workspace is attached that is about to stand still: on the same network again it has
/// nothing to be told.
#[derive(Debug)]
pub struct Attachment {
    /// The settings, where they are known; see [`network::now`].
    pub settings: Option<String>,
    /// Whether there may be connections to the outside.
    pub connected: bool,
}

/// Notes how the machine is attached.
pub fn prepare_attachment(agent: &Agent) {
    let settings = network::now(agent).ok();
    let connected = sockets::any(agent).unwrap_or(true);
    agent.ready.borrow_mut().attachment = Some(Attachment { settings, connected });
}

/// How it was attached; told once. Nothing is known of an agent that was started anew.
pub fn attachment(agent: &Agent) -> Attachment {
    let known = agent.ready.borrow_mut().attachment.take();
    known.unwrap_or(Attachment { settings: None, connected: true })
}

fn netlink(protocol: SockProtocol) -> io::Result<SharedNetlink> {
    Ok(Rc::new(RefCell::new(Netlink::open_small(protocol)?)))
}

/// An error that was met when something was opened, once more for who uses it.
pub fn again(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

fn read_fault(agent: &Agent) -> String {
    let named = std::fs::read_to_string(agent.path(FAULT_INJECTION)).unwrap_or_default();
    named.trim().to_owned()
}

/// The item that is to fail; empty where none is.
pub fn fault(agent: &Agent) -> String {
    let known = agent.ready.borrow_mut().fault.take();
    known.unwrap_or_else(|| read_fault(agent))
}

/// The hooks of `agent`'s machine.
pub fn hooks(agent: &Agent) -> Vec<PathBuf> {
    let known = agent.ready.borrow_mut().hooks.take();
    known.unwrap_or_else(|| hooks::list(agent))
}

/// To ask about links by.
pub fn links(agent: &Agent) -> io::Result<Rc<Links>> {
    let known = agent.ready.borrow().links.clone();
    known.map_or_else(|| Links::open().map(Rc::new), Ok)
}

/// The link as it was then; told once, for it is about to change.
pub fn link(agent: &Agent) -> Option<Seen> {
    agent.ready.borrow_mut().link.take()
}

/// To ask about and change addresses and routes by.
pub fn route(agent: &Agent) -> io::Result<SharedNetlink> {
    let known = agent.ready.borrow().route.clone();
    known.map_or_else(|| netlink(SockProtocol::NetlinkRoute), Ok)
}

/// To ask about sockets by.
pub fn sock_diag(agent: &Agent) -> io::Result<SharedNetlink> {
    let known = agent.ready.borrow().sock_diag.clone();
    known.map_or_else(|| netlink(SockProtocol::NetlinkSockDiag), Ok)
}

/// The kernel's random number generator.
pub fn random(agent: &Agent) -> io::Result<Rc<File>> {
    let known = agent.ready.borrow().random.clone();
    known.map_or_else(|| crate::entropy::open().map(Rc::new), Ok)
}

/// The journal daemon that waits for its start, where there is one.
pub fn journald(agent: &Agent) -> Option<Rc<Waiting>> {
    agent.ready.borrow().journald.clone()
}
