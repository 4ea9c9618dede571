//! Making a clone a machine of its own: `POST /identity`.
//!
//! Each item is a file of its own and is applied, then read back from where it takes effect; only
//! the read-back can make it verified (see [`proof`]). The first item that fails ends it: the
//! workload stays frozen, nothing is served any more, and the host destroys the machine.

mod boot_id;
mod clock;
mod entropy;
mod generation;
mod hostname;
mod machine_id;
mod proof;
mod random_seed;
mod thaw;
mod token;
mod write;

pub use proof::Verified;

use crate::agent::Agent;
use crate::clock::{HostTime, Instant};
use crate::server::ApiError;
use crate::wire::{AgentState, IdentityReport, IdentityRequest, codes};
use proof::{Context, Item};

/// Present where a template may be told to fail an item, for testing what happens then.
const FAULT_INJECTION: &str = "/etc/rethaw/fault-injection";

fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(400, codes::INVALID_REQUEST, message)
}

/// Applies the request. `received` is when it began to arrive.
///
/// # Errors
/// 409 unless the machine waits for an identity, 400 for a request that cannot be one. An item
/// that fails is no error here: it is in the report.
pub async fn apply(
    agent: &Agent,
    request: IdentityRequest,
    received: Instant,
) -> Result<IdentityReport, ApiError> {
    if !matches!(agent.state(), AgentState::Settled | AgentState::Frozen) {
        let text = format!("a machine that is {:?} takes no identity", agent.state());
        return Err(ApiError::new(409, codes::WRONG_STATE, text));
    }
    check(agent, &request)?;
    let host = HostTime::new(request.wall_clock_unix_nanos, received)?;
    // Until every item is proven the machine counts as failed, whatever interrupts this.
    agent.set_state(AgentState::IdentityFailed);
    let context = Context { agent, request: &request, host };
    let mut items: Vec<Box<dyn Item>> = vec![
        Box::new(entropy::Entropy::default()),
        Box::new(clock::Clock),
        Box::new(hostname::Hostname),
        Box::new(machine_id::MachineId),
        Box::new(boot_id::BootId),
        Box::new(random_seed::RandomSeed),
        Box::new(token::Token),
        Box::new(generation::Generation),
    ];
    items.push(Box::new(thaw::Thaw));
    let mut report = Vec::with_capacity(items.len());
    let mut failed = false;
    for mut item in items {
        let result = proof::run(item.as_mut(), &context);
        failed = !result.is_verified() && result.skipped.is_none();
        report.push(result);
        if failed {
            break;
        }
    }
    if !failed {
        *agent.generation.borrow_mut() = Some(request.generation.clone());
        *agent.env.borrow_mut() = request.env;
        agent.set_state(AgentState::Live);
    }
    Ok(IdentityReport {
        generation: request.generation,
        items: report,
        total_micros: received.micros(),
    })
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
fn check(agent: &Agent, request: &IdentityRequest) -> Result<(), ApiError> {
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
    if request.fail_item.is_some() && !agent.path(FAULT_INJECTION).exists() {
        return Err(invalid("fail_item: this template was not built for fault injection"));
    }
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
