//! A slot's nftables rules, in the slot's own namespace: what its guest may send and get.
//!
//! ```text
//! prerouting  spoofed senders dropped; too fast dropped
//! input       name server, ping, neighbour discovery; nothing else reaches the gateway itself
//! forward     in:  answers, and what the service itself opens (port proxy)
//!             out: answers to the service; never what is reserved; connections that were let
//!             through once; then `egress`
//! egress      the sandbox's policy; what it does not accept is refused
//! ```
//!
//! A changed policy forgets all connections, so that each has to pass `egress` again.
//!
//! `spoof`, `limits` and `egress` are emptied and filled anew when a VM is attached or its policy
//! changes, in one transaction: there is no moment without rules.

use std::time::Duration;

use super::cidr::{self, Cidr};
use super::nft::{Batch, Element, Family, Hook, Limit, Rule, SetKind, Verdict};
use super::plan::{Addresses, Plan};
use super::policy::{Internet, Limits, Policy, reserved};

/// The table's name in every slot.
pub const TABLE: &str = "rethaw";
/// The guest's link.
pub const TAP: &str = "tap0";
/// The link to the service's namespace.
pub const UP: &str = "up0";

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;
const PING: u8 = 8;
const PING_V6: u8 = 128;
const NEIGHBOUR: [u8; 2] = [135, 136];
/// Router solicitations, reports of multicast listeners.
const SEARCHES: [u8; 3] = [133, 131, 143];
const DNS: u16 = 53;

/// Named counters of what did not pass, in the order of the API.
pub const COUNTERS: &[&str] = &["denied", "reserved", "spoofed", "limited", "to_gateway"];
/// Named counters of what passed: from the guest, to the guest.
pub const PASSED: [&str; 2] = ["sent", "received"];

/// The reserved ranges of one protocol, with the service's own slots and what the operator denies.
fn never(plan: &Plan, denied: &[Cidr], v4: bool) -> Vec<(u128, u128)> {
    let all: Vec<Cidr> = reserved()
        .into_iter()
        .chain([plan.v4])
        .chain(plan.v6)
        .chain(denied.iter().copied())
        .collect();
    cidr::ranges(all.iter().filter(|c| c.is_v4() == v4))
}

fn families() -> [(Family, bool, &'static str); 2] {
    [(Family::V4, true, "4"), (Family::V6, false, "6")]
}

/// Everything a slot has before a VM is attached: nothing passes but names, and those only if
/// somebody answers.
pub fn base(plan: &Plan, slot: u16, denied: &[Cidr]) -> Batch {
    let mut batch = Batch::new(TABLE).table();
    for counter in COUNTERS.iter().chain(&PASSED) {
        batch = batch.counter(counter);
    }
    for (family, v4, suffix) in families() {
        let name = |base: &str| format!("{base}{suffix}");
        batch = batch
            .set(&name("never"), family, SetKind::Ranges)
            .elements(&name("never"), &Element::ranges(&never(plan, denied, v4), v4))
            .set(&name("networks"), family, SetKind::Ranges)
            .set(&name("names"), family, SetKind::Passing);
    }
    for chain in ["spoof", "limits", "egress"] {
        batch = batch.chain(chain);
    }
    batch = batch.base_chain("prerouting", Hook::Prerouting, true);
    let jump = |chain| Rule::new().then(&Verdict::Jump(chain));
    batch = batch.rule("prerouting", Rule::new().from_link(TAP).then(&Verdict::Jump("spoof")));
    batch = batch.rule("prerouting", jump("limits"));
    batch = input(batch);
    forward(batch, plan, slot)
}

fn input(batch: Batch) -> Batch {
    let accept = |rule: Rule| rule.then(&Verdict::Accept);
    let guest = || Rule::new().from_link(TAP);
    let mut batch = batch
        .base_chain("input", Hook::Input, false)
        .rule("input", accept(Rule::new().from_link("lo")))
        .rule("input", accept(guest().transport(UDP).to_port(DNS)))
        .rule("input", accept(guest().transport(TCP).to_port(DNS)))
        .rule("input", accept(guest().family(Family::V4).transport(ICMP).icmp_type(PING)))
        .rule("input", accept(guest().family(Family::V6).transport(ICMP_V6).icmp_type(PING_V6)));
    for kind in NEIGHBOUR {
        let rule = Rule::new().family(Family::V6).transport(ICMP_V6).icmp_type(kind);
        batch = batch.rule("input", accept(rule));
    }
    batch.rule("input", guest().count("to_gateway").then(&Verdict::Drop))
}

fn forward(batch: Batch, plan: &Plan, slot: u16) -> Batch {
    let inward = || Rule::new().from_link(UP);
    let outward = || Rule::new().from_link(TAP);
    let mut batch = batch
        .base_chain("forward", Hook::Forward, false)
        .rule("forward", inward().of_known_connection().count(PASSED[1]).then(&Verdict::Accept));
    let (service, _) = plan.cable(slot);
    let service_v6 = plan.cable_v6(slot).map(|(near, _)| near.into());
    for service in std::iter::once(service.into()).chain(service_v6) {
        batch =
            batch.rule("forward", inward().source(service).count(PASSED[1]).then(&Verdict::Accept));
    }
    batch = batch.rule(
        "forward",
        outward().is_reply().of_known_connection().count(PASSED[0]).then(&Verdict::Accept),
    );
    for (family, _, suffix) in families() {
        let never = outward().to_set(family, &format!("never{suffix}"));
        batch = batch.rule("forward", never.count("reserved").then(&Verdict::Reject));
    }
    let known = outward().of_known_connection().count(PASSED[0]).then(&Verdict::Accept);
    batch
        .rule("forward", known)
        .rule("forward", outward().then(&Verdict::Jump("egress")))
        .rule("forward", outward().count("denied").then(&Verdict::Reject))
}

/// Ties the slot to the VM with this hardware address: whoever sends from another is not it.
pub fn attached(addresses: &Addresses, mac: [u8; 6]) -> Batch {
    let spoofed = |rule: Rule| rule.count("spoofed").then(&Verdict::Drop);
    let mut batch = Batch::new(TABLE)
        .flush_chain("spoof")
        .rule("spoof", spoofed(Rule::new().other_hardware_source(mac)))
        .rule("spoof", spoofed(Rule::new().other_source(addresses.ipv4.into())));
    match addresses.ipv6 {
        None => batch = batch.rule("spoof", spoofed(Rule::new().family(Family::V6))),
        Some(ipv6) => {
            // Neighbour discovery may come from the link-local address; the input chain lets
            // nothing else of it in, and routers do not pass it on.
            for kind in NEIGHBOUR {
                let rule = Rule::new().family(Family::V6).transport(ICMP_V6).icmp_type(kind);
                batch = batch.rule("spoof", rule.then(&Verdict::Accept));
            }
            // Its kernel looks for routers and groups by itself; there are none.
            for kind in SEARCHES {
                let rule = Rule::new().family(Family::V6).transport(ICMP_V6).icmp_type(kind);
                batch = batch.rule("spoof", rule.then(&Verdict::Drop));
            }
            batch = batch.rule("spoof", spoofed(Rule::new().other_source(ipv6.into())));
        }
    }
    batch
}

/// What the sandbox may reach and how fast, in place of what it might before.
pub fn policy(policy: &Policy) -> Batch {
    let mut batch = Batch::new(TABLE).flush_chain("egress").flush_chain("limits");
    for (_, v4, suffix) in families() {
        let networks = policy.internet.networks().filter(|c| c.is_v4() == v4);
        let elements = Element::ranges(&cidr::ranges(networks), v4);
        batch = batch
            .flush_set(&format!("networks{suffix}"))
            .flush_set(&format!("names{suffix}"))
            .elements(&format!("networks{suffix}"), &elements);
    }
    let pass = |rule: Rule| rule.count(PASSED[0]).then(&Verdict::Accept);
    match &policy.internet {
        Internet::Off => {}
        Internet::On => batch = batch.rule("egress", pass(Rule::new())),
        Internet::Allow(_) => {
            for (family, _, suffix) in families() {
                for set in ["networks", "names"] {
                    let rule = Rule::new().to_set(family, &format!("{set}{suffix}"));
                    batch = batch.rule("egress", pass(rule));
                }
            }
        }
    }
    limits(batch, policy.limits)
}

fn limits(mut batch: Batch, limits: Limits) -> Batch {
    let all =
        [limits.packets_per_second.map(Limit::Packets), limits.bytes_per_second.map(Limit::Bytes)];
    for link in [TAP, UP] {
        for limit in all.into_iter().flatten() {
            let rule = Rule::new().from_link(link).above(limit);
            batch = batch.rule("limits", rule.count("limited").then(&Verdict::Drop));
        }
    }
    batch
}

/// Addresses that an allowed name has, for as long as the guest may believe the answer.
pub fn names(addresses: &[std::net::IpAddr], timeout: Duration) -> Batch {
    let mut batch = Batch::new(TABLE);
    for (_, v4, suffix) in families() {
        let elements: Vec<Element> = addresses
            .iter()
            .filter(|a| a.is_ipv4() == v4)
            .map(|a| Element::passing(*a, timeout))
            .collect();
        let set = format!("names{suffix}");
        // One that is there would keep its old time: it is made sure of, removed and made anew.
        batch = batch
            .elements(&set, &elements)
            .remove_elements(&set, &elements)
            .elements(&set, &elements);
    }
    batch
}
