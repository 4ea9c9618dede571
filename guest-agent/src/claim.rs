//! What a VM needs when it is handed to a user, or comes back to one: the time, the token, the
//! environment. These calls are on the claim path, so they do nothing else.

use crate::agent::Agent;
use crate::clock::{HostTime, Instant};
use crate::server::ApiError;
use crate::wire::{AgentState, ClaimReport, ClaimRequest, ClockRequest, ResumeRequest, codes};
use crate::{entropy, identity, token};
use std::collections::BTreeMap;

/// `POST /claim`. `received` is when the request began to arrive.
///
/// # Errors
/// The clock cannot be set or the token not be kept.
pub fn claim(
    agent: &Agent,
    request: ClaimRequest,
    received: Instant,
) -> Result<ClaimReport, ApiError> {
    let report = set(agent, request.wall_clock_unix_nanos, received)?;
    take(agent, request.access_token.as_deref(), request.env)?;
    Ok(ClaimReport { total_micros: received.micros(), ..report })
}

/// `POST /clock`.
///
/// # Errors
/// The clock cannot be set.
pub fn set_clock(agent: &Agent, request: &ClockRequest) -> Result<ClaimReport, ApiError> {
    set(agent, request.wall_clock_unix_nanos, Instant::now()?)
}

/// `POST /resume`: the same machine goes on, but must not repeat random numbers that the paused
/// memory holds already. `received` is when the request began to arrive.
///
/// # Errors
/// 409 unless it was frozen (or runs), 400 on too little entropy, and when a step fails.
pub async fn resume(
    agent: &Agent,
    request: ResumeRequest,
    received: Instant,
) -> Result<ClaimReport, ApiError> {
    if !matches!(agent.state(), AgentState::Frozen | AgentState::Live) {
        let text = format!("a machine that is {:?} cannot be resumed", agent.state());
        return Err(ApiError::new(409, codes::WRONG_STATE, text));
    }
    entropy::check(&request.entropy.0)
        .map_err(|e| ApiError::new(400, codes::INVALID_REQUEST, e.to_string()))?;
    entropy::reseed(&*identity::random(agent)?, &request.entropy.0)?;
    let report = set(agent, request.wall_clock_unix_nanos, received)?;
    if let Some(network) = request.network {
        let host = HostTime::new(request.wall_clock_unix_nanos, received)?;
        identity::attach(agent, network, host).await?;
    }
    let mut env = agent.env.borrow().clone();
    env.extend(request.env);
    take(agent, request.access_token.as_deref(), env)?;
    if agent.state() == AgentState::Frozen {
        agent.workload.thaw()?;
        if agent.workload.is_frozen()? {
            return Err(ApiError::internal("the workload is still frozen"));
        }
        agent.set_state(AgentState::Live)?;
    }
    Ok(ClaimReport { total_micros: received.micros(), ..report })
}

fn set(agent: &Agent, unix_nanos: u64, received: Instant) -> Result<ClaimReport, ApiError> {
    let host = HostTime::new(unix_nanos, received)?;
    let before = host.offset()?;
    let after = host.set()?;
    Ok(ClaimReport {
        generation: agent.generation.borrow().clone(),
        clock_error_nanos: before.nanos,
        clock_residual_nanos: after.nanos,
        total_micros: received.micros(),
    })
}

fn take(
    agent: &Agent,
    access_token: Option<&str>,
    env: BTreeMap<String, String>,
) -> Result<(), ApiError> {
    crate::exec::check_env(&env)?;
    if access_token.is_some() {
        token::store(agent, access_token)?;
    }
    *agent.env.borrow_mut() = env;
    Ok(())
}
