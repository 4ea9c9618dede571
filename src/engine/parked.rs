//! Warm VMs: identity proven, a claim rehearsed, nobody's yet.
//!
//! ```text
//! Reidentified --rehearse--> Warm, runs --settle, rehearse, pause--> Warm, parked
//!                              |                                        |
//!                              +---------------- hand over -------------+--> Reidentified, somebody's
//! ```

use std::time::{Duration, Instant};

use guest_agent::client::AgentError;
use guest_agent::wire::{ClaimReport, ClaimRequest, ExecFrame, ExecRequest};
use snapshotter::priority;
use snapshotter::vmm::Priority;

use super::context::RestoreContext;
use super::identity::Owner;
use super::ids;
use super::lifecycle::{Reidentified, RestoreError, Spawned, Timings, millis};
use super::template::ReadyTemplate;
use super::token::AccessToken;
use crate::failpoint;
use crate::net::policy::Policy;

/// How long a VM has nothing to do before it is parked.
const REST: Duration = Duration::from_millis(10);
/// How long the hand-over of a parked VM may take before it is thrown away for another one.
const CLAIM_DEADLINE: Duration = Duration::from_secs(3);
/// How long a VM that is handed over goes before everything else. Most take 2 ms.
const MOST_HURRY: Duration = Duration::from_millis(20);
/// How long the first command may take, of which every page and instruction is cold.
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// Hand-overs rehearsed at once: the first brings in the pages, and an emulator translates code on its
/// first runs.
const REHEARSALS: u32 = 2;
/// And before the VM is parked: after it has been idle, a claim takes other ways through its kernel.
const LAST_REHEARSALS: u32 = 3;

/// A VM with an identity of its own that waits for a claim.
#[derive(Debug)]
pub struct Warm {
    /// The machine.
    pub inner: Reidentified,
    /// Its vCPUs do not run.
    pub parked: bool,
}

/// How much is rehearsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WarmUp {
    /// A claim: its pages and code are there afterwards.
    Claim,
    /// A claim and a command; for when there is time.
    ClaimAndCommand,
}

/// From a template to a VM that can be claimed and still runs, at a priority that costs claims nothing.
pub async fn restore(
    context: &RestoreContext,
    template: &ReadyTemplate,
    warm_up: WarmUp,
) -> Result<Warm, RestoreError> {
    let started = Instant::now();
    let spawned = Spawned::spawn(context, template, Priority::Background).await?;
    let pid = spawned.record().process.pid;
    let restored = async {
        let mut vm = spawned.finish(started, None).await?;
        match vm.rehearse(warm_up).await {
            Ok(()) => Ok(Warm { inner: vm, parked: false }),
            Err(e) => Err(give_up(vm, context, e).await),
        }
    };
    not_starved(pid, restored).await
}

/// Goes on at normal priority when it takes too long: a host that is busy for good must not keep the
/// pool empty for good.
async fn not_starved<T>(pid: i32, work: impl Future<Output = T>) -> T {
    normal_after(priority::PATIENCE, pid, work).await
}

async fn normal_after<T>(patience: Duration, pid: i32, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    tokio::select! {
        done = &mut work => done,
        () = tokio::time::sleep(patience) => {
            priority::set(pid, Priority::Normal);
            work.await
        }
    }
}

async fn give_up(vm: Reidentified, context: &RestoreContext, why: RestoreError) -> RestoreError {
    let id = vm.id.clone();
    vm.machine.destroy().await;
    match context.db.vm_gone(&id).await {
        Ok(()) => why,
        Err(e) => e.into(),
    }
}

impl Reidentified {
    async fn rehearse(&mut self, warm_up: WarmUp) -> Result<(), RestoreError> {
        if warm_up == WarmUp::ClaimAndCommand {
            self.rehearse_command().await?;
            self.reconnect().await?;
        }
        for _ in 0..REHEARSALS {
            self.rehearse_claim().await?;
        }
        Ok(())
    }

    /// One hand-over to nobody: the pages and translated code a claim needs are then there, and a VM
    /// that could not be claimed is found now instead of under a user's request. The token opens
    /// nothing; the file it is kept in is there then.
    async fn rehearse_claim(&self) -> Result<(), RestoreError> {
        let request = ClaimRequest {
            wall_clock_unix_nanos: ids::wall_clock_unix_nanos(),
            access_token: Some(AccessToken::of_nobody()),
            ..ClaimRequest::default()
        };
        let done = self.machine.agent.claim(&request, CLAIM_DEADLINE).await;
        done.map(drop).map_err(|source| self.agent_error("rehearsal of a claim", source))
    }

    /// Runs `/bin/true`: what a command needs of kernel, libc and agent is then there.
    async fn rehearse_command(&self) -> Result<(), RestoreError> {
        let request = ExecRequest { argv: vec!["/bin/true".to_owned()], ..ExecRequest::default() };
        let run = async {
            let mut frames = self.machine.agent.exec(&request, COMMAND_DEADLINE).await?;
            while let Some(frame) = frames.next_frame().await? {
                if let ExecFrame::Exit(_) = frame {
                    break;
                }
            }
            Ok(())
        };
        let timeout = || AgentError::Timeout {
            call: "rehearsal of a command".to_owned(),
            deadline: COMMAND_DEADLINE,
        };
        let done = tokio::time::timeout(COMMAND_DEADLINE, run).await;
        done.unwrap_or_else(|_| Err(timeout()))
            .map_err(|source| self.agent_error("rehearsal of a command", source))
    }

    /// Starts a new connection to the agent where the one there is would be slower to claim by.
    async fn reconnect(&mut self) -> Result<(), RestoreError> {
        if !self.machine.agent.could_ask_anew() {
            return Ok(());
        }
        self.machine.agent.hang_up().await;
        let agent = self.machine.vm.connect_agent(CLAIM_DEADLINE).await;
        self.machine.agent =
            agent.map_err(|source| self.agent_error("a new connection", source))?;
        Ok(())
    }

    /// Hands the VM over: clock, token and environment in one round trip.
    async fn hand_over(&self, owner: &Owner) -> Result<ClaimReport, RestoreError> {
        let request = ClaimRequest {
            wall_clock_unix_nanos: ids::wall_clock_unix_nanos(),
            access_token: Some(owner.access_token.secret.clone()),
            env: owner.env.clone(),
        };
        let done = self.machine.agent.claim(&request, CLAIM_DEADLINE).await;
        done.map_err(|source| self.agent_error("claim", source))
    }

    /// Sets what it may reach.
    pub async fn set_policy(&self, policy: &Policy) -> Result<(), RestoreError> {
        match self.machine.rules() {
            Some(rules) => Ok(rules.set_policy(policy).await?),
            None => Ok(()),
        }
    }

    pub(super) fn agent_error(&self, step: &'static str, source: AgentError) -> RestoreError {
        RestoreError::Agent { id: self.id.clone(), step, source }
    }
}

impl Warm {
    /// Stops the vCPUs, after a last rehearsal, and writes down that it may be claimed.
    pub async fn park(self, context: &RestoreContext) -> Result<Self, RestoreError> {
        let Self { inner: vm, .. } = self;
        let attempt = async {
            for _ in 0..LAST_REHEARSALS {
                vm.rehearse_claim().await?;
            }
            // What the last rehearsal left to do would else be done at the beginning of the claim.
            tokio::time::sleep(REST).await;
            vm.machine.vm.pause().await?;
            // It does not run, so it reaches nothing, and takes no time from anybody: what most claims
            // will want is set ahead.
            vm.set_policy(&Policy::default()).await?;
            vm.machine.vm.set_priority(Priority::HandOver);
            context.db.vm_parked(&vm.id, &vm.identity).await?;
            Ok(())
        };
        match not_starved(vm.machine.vm.record().process.pid, attempt).await {
            Ok(()) => Ok(Self { inner: vm, parked: true }),
            Err(e) => Err(give_up(vm, context, e).await),
        }
    }

    /// Lets the vCPUs run, if they do not, and hands the VM over. The hand-over is sent before they run:
    /// it then waits in the VM's port for no more than that. Afterwards the VM has still the priority of
    /// a hand-over. What is returned are its phases.
    pub async fn hand_over(&self, owner: &Owner) -> Result<Timings, RestoreError> {
        let Self { inner: vm, parked } = self;
        let since = Instant::now();
        let resumed = async {
            if *parked {
                vm.machine.vm.let_run().await?;
            } else {
                vm.machine.vm.set_priority(Priority::HandOver);
            }
            let took = since.elapsed();
            failpoint::reached("claim.unparked").await;
            Ok(took)
        };
        let pid = vm.machine.vm.record().process.pid;
        let handed_over = async { tokio::try_join!(resumed, vm.hand_over(owner)) };
        let (resumed, report) = normal_after(MOST_HURRY, pid, handed_over).await?;
        let guest = report.total_micros as f64 / 1e3;
        let phases = [
            ("resume", millis(resumed)),
            ("claim", millis(since.elapsed())),
            ("claim_guest", guest),
        ];
        Ok(phases.map(|(phase, ms)| (phase.to_owned(), ms)).into_iter().collect())
    }
}
