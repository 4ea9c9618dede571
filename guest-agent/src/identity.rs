//! Making a clone a machine of its own: `POST /identity`.
//!
//! Each item is a file of its own and is applied, then read back from where it takes effect; only
//! the read-back can make it verified (see [`proof`]). The first item that fails ends it: the
//! workload stays frozen, nothing is served any more, and the host destroys the machine.

mod boot_id;
mod clock;
mod entropy;
mod generation;
mod hooks;
mod hostname;
mod journald;
mod machine_id;
mod network;
mod proof;
mod random_seed;
mod ready;
mod sockets;
mod ssh_host_keys;
mod thaw;
mod token;
mod write;

pub use journald::start as start_journald;
pub use proof::Verified;
pub use ready::{Ready, prepare as prepare_copy, prepare_attachment, random};
pub use write::rewrite;

use crate::agent::Agent;
use crate::clock::{HostTime, Instant};
use crate::server::ApiError;
use crate::token as access_token;
use crate::wire::{AgentState, IdentityReport, IdentityRequest, NetworkSettings, codes};
use proof::{Context, Item, Run};
use std::rc::Rc;

/// Files that an identity changes, with their modes.
const FILES: &[(&str, u32)] = &[
    ("/etc/hostname", 0o644),
    ("/etc/hosts", 0o644),
    ("/etc/machine-id", 0o444),
    ("/etc/resolv.conf", 0o644),
];

fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(400, codes::INVALID_REQUEST, message)
}

/// Applies the request. `received` is when it began to arrive.
///
/// # Errors
/// 409 unless the machine waits for an identity, 400 for a request that cannot be one. An item
/// that fails is no error here: it is in the report.
pub async fn apply(
    agent: &Rc<Agent>,
    request: IdentityRequest,
    received: Instant,
) -> Result<IdentityReport, ApiError> {
    if !matches!(agent.state(), AgentState::Settled | AgentState::Frozen) {
        let text = format!("a machine that is {:?} takes no identity", agent.state());
        return Err(ApiError::new(409, codes::WRONG_STATE, text));
    }
    check(&request)?;
    let wanted_network = network::Wanted::parse(&request).map_err(invalid)?;
    let host = HostTime::new(request.wall_clock_unix_nanos, received)?;
    // Until every item is proven the machine counts as failed, whatever interrupts this.
    agent.distrust();
    let fault = ready::fault(agent);
    let context = Context { agent, request: &request, host, fault: &fault };
    let mut items: [Box<dyn Item>; 14] = [
        Box::new(entropy::Entropy::new(agent)),
        Box::new(clock::Clock),
        Box::new(network::Network::new(agent, wanted_network)),
        Box::new(sockets::Sockets::new(agent)),
        Box::new(hostname::Hostname),
        Box::new(machine_id::MachineId::default()),
        Box::new(boot_id::BootId),
        Box::new(journald::Journald::new(agent)),
        Box::new(random_seed::RandomSeed::default()),
        Box::new(ssh_host_keys::SshHostKeys),
        Box::new(token::Token),
        Box::new(generation::Generation),
        Box::new(hooks::Hooks::find(agent)),
        Box::new(thaw::Thaw),
    ];
    let mut run = Run::default();
    for item in &mut items {
        run.item(item.as_mut(), &context).await;
    }
    let (items, failed) = run.finish();
    if failed {
        agent.set_state(AgentState::IdentityFailed)?;
    } else {
        *agent.generation.borrow_mut() = Some(request.generation.clone());
        *agent.env.borrow_mut() = request.env;
        agent.set_state(AgentState::Live)?;
        journald::start_later(agent);
    }
    Ok(IdentityReport { generation: request.generation, items, total_micros: received.micros() })
}

/// Attaches a machine that keeps its identity to a network: addresses are set, and connections that
/// were open over the old one closed. Both only where that is not so already: the workload is still
/// frozen, and nothing has changed since. Addresses may be the same, what the host knew of
/// connections is gone in any case.
///
/// # Errors
/// 400 for settings that cannot be, 500 for what could not be set.
pub async fn attach(
    agent: &Agent,
    settings: NetworkSettings,
    host: HostTime,
) -> Result<(), ApiError> {
    let request = IdentityRequest::default().on(settings);
    let wanted = network::Wanted::parse(&request).map_err(invalid)?;
    let context = Context { agent, request: &request, host, fault: "" };
    let frozen = ready::attachment(agent);
    let mut run = Run::default();
    if frozen.settings.is_none_or(|settings| settings != wanted.description()) {
        run.item(&mut network::Network::new(agent, wanted), &context).await;
    }
    if frozen.connected {
        run.item(&mut sockets::Sockets::new(agent), &context).await;
    }
    let (items, failed) = run.finish();
    match items.into_iter().find_map(|item| item.error.map(|error| (item.item, error))) {
        Some((item, error)) if failed => Err(ApiError::internal(format!("{item}: {error}"))),
        _ => Ok(()),
    }
}

/// Does at the making of a template what would be slow in each of its clones: files move to memory,
/// the boot id is mounted over, the NIC is up, the journal daemon has ended. Journals go, with
/// `vacuum` those on the disk, too; what is removed is added to `removed`.
///
/// # Errors
/// What could not be done.
pub fn prepare(agent: &Agent, vacuum: bool, removed: &mut Vec<String>) -> Result<(), ApiError> {
    for (path, mode) in FILES {
        write::prepare(agent, path, *mode).map_err(|e| ApiError::from_io(&e, path))?;
    }
    // What is looked for and not found is remembered by the kernel, and so by the snapshot.
    ssh_host_keys::in_template(agent);
    machine_id::prepare(agent).map_err(|e| ApiError::internal(e.to_string()))?;
    generation::prepare(agent).map_err(|e| ApiError::internal(e.to_string()))?;
    boot_id::prepare(agent).map_err(|e| ApiError::internal(format!("boot_id: {e}")))?;
    network::prepare().map_err(|e| ApiError::internal(format!("network: {e}")))?;
    access_token::prepare(agent).map_err(|e| ApiError::internal(format!("token: {e}")))?;
    prepare_copy(agent);
    let ended = journald::prepare(agent, vacuum, removed);
    ended.map_err(|e| ApiError::internal(format!("journald: {e}")))
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn is_uuid(text: &str) -> bool {
    let groups: Vec<&str> = text.split('-').collect();
    groups.iter().map(|g| g.len()).eq([8, 4, 4, 4, 12]) && groups.iter().all(|g| is_hex(g))
}

fn is_hostname(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    (1..=63).contains(&text.len())
        && text.bytes().all(good)
        && !text.starts_with(['-', '.'])
        && !text.ends_with(['-', '.'])
}

/// Refuses a request that is malformed, before anything is changed.
fn check(request: &IdentityRequest) -> Result<(), ApiError> {
    if !is_uuid(&request.generation) {
        return Err(invalid(format!("generation {:?} is no lower-case UUID", request.generation)));
    }
    if !is_uuid(&request.boot_id) {
        return Err(invalid(format!("boot_id {:?} is no lower-case UUID", request.boot_id)));
    }
    if request.machine_id.len() != 32
        || !is_hex(&request.machine_id)
        || request.machine_id.bytes().all(|b| b == b'0')
    {
        return Err(invalid(format!("machine_id {:?} is no machine id", request.machine_id)));
    }
    if !is_hostname(&request.hostname) {
        return Err(invalid(format!("hostname {:?} is no host name", request.hostname)));
    }
    crate::entropy::check(&request.entropy.0).map_err(|e| invalid(e.to_string()))?;
    crate::exec::check_env(&request.env)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        assert!(is_uuid("0b6f3a2e-6a4e-4e3e-9b8b-0123456789ab"));
        assert!(!is_uuid("0b6f3a2e-6a4e-4e3e-9b8b-0123456789AB"));
        assert!(!is_uuid("0b6f3a2e6a4e4e3e9b8b0123456789ab"));
        assert!(is_hostname("vm-1.local"));
        assert!(!is_hostname("-vm") && !is_hostname("") && !is_hostname("a b"));
    }
}
