//! A snapshot is tried before it is published: restored once, it has to run what users run first.
//! The pages that takes are its working set. Then the linter has the last word.

use std::path::Path;
use std::time::Duration;

use guest_agent::client::AgentError;
use guest_agent::wire::{ExecFrame, ExecRequest};
use snapshotter::manifest::WORKING_SET;

use super::build::{BuildLog, Runner, Spec, StepError};
use super::db::DbError;
use super::lifecycle::{self, Reidentified, RestoreError};
use super::template::{ReadyTemplate, Template};
use super::{Engine, lint};

/// What a clone is expected to do first; its pages are the working set.
const FIRST_COMMANDS: &[&[&str]] = &[&["/bin/true"], &["python3", "-c", "print(6 * 7)"]];
const FIRST_COMMAND_DEADLINE: Duration = Duration::from_secs(60);
/// Buffers of the guest's driver for what comes through the agent's port: as many as QEMU's queue is
/// long. The driver uses one after the other, so that each message would meet a page nobody has used.
const PORT_BUFFERS: usize = 128;
const MESSAGE_DEADLINE: Duration = Duration::from_secs(10);

/// Why a snapshot is not published.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// It does not come up.
    #[error("trial restore: {0}")]
    Restore(#[from] RestoreError),
    /// It does not run what any machine runs.
    #[error("trial command {command:?}: {problem}")]
    Command {
        /// The command.
        command: &'static str,
        /// What happened.
        problem: String,
    },
    /// A check of its own fails.
    #[error(transparent)]
    Check(#[from] StepError),
    /// It holds what clones should not share.
    #[error(transparent)]
    Lint(#[from] lint::LintError),
    /// Its pages could not be noted.
    #[error("working set: {0}")]
    WorkingSet(String),
    /// The state database.
    #[error(transparent)]
    Db(#[from] DbError),
}

/// The checks of a derived template, and who is told about them.
#[derive(Debug)]
pub struct Checks<'a> {
    /// Has them.
    pub spec: &'a Spec,
    /// Gets the progress.
    pub template: &'a Template,
    /// Gets the output.
    pub log: &'a BuildLog,
}

impl Engine {
    /// Tries `snapshot`, whose files are in `draft`, and writes its working set there.
    pub(super) async fn trial(
        &self,
        snapshot: &ReadyTemplate,
        draft: &Path,
        checks: Option<Checks<'_>>,
    ) -> Result<(), TrialError> {
        let mut trial = snapshot.clone();
        // Nothing is put in place ahead, or it would not be seen to be needed.
        trial.memory.working_set = None;
        trial.memory.record = true;
        let vm = lifecycle::restore(&self.context, &trial, None).await?;
        let id = vm.id.clone();
        let tried = self.try_vm(&vm, &trial, draft, checks).await;
        vm.machine.destroy().await;
        self.context.db.vm_gone(&id).await?;
        tried
    }

    async fn try_vm(
        &self,
        vm: &Reidentified,
        trial: &ReadyTemplate,
        draft: &Path,
        checks: Option<Checks<'_>>,
    ) -> Result<(), TrialError> {
        for argv in FIRST_COMMANDS {
            match first_command(vm, argv).await {
                // A derived template may have done away with it.
                Err(TrialError::Command { command: "python3", .. }) if checks.is_some() => {}
                done => done?,
            }
        }
        for _ in 0..PORT_BUFFERS {
            let asked = vm.machine.agent.health(MESSAGE_DEADLINE).await;
            asked.map_err(|source| vm.agent_error("trial message", source))?;
        }
        if let Some(Checks { spec, template, log }) = checks {
            let env = trial.manifest.env.clone();
            let agent = &vm.machine.agent;
            Runner::new(agent, template, log, &self.inputs, env).check(spec).await?;
        }
        let set = self.pager.recording(&vm.id);
        let set = set.map_err(|e| TrialError::WorkingSet(e.to_string()))?;
        let saved = set.save(&draft.join(WORKING_SET));
        saved.map_err(|e| TrialError::WorkingSet(e.to_string()))?;
        // After the recording: no clone does this first.
        Ok(lint::check(&vm.machine.agent).await?)
    }
}

async fn first_command(vm: &Reidentified, argv: &'static [&'static str]) -> Result<(), TrialError> {
    let problem = |problem: String| TrialError::Command { command: argv[0], problem };
    let request = ExecRequest {
        argv: argv.iter().map(|a| (*a).to_owned()).collect(),
        ..ExecRequest::default()
    };
    let run = async {
        let mut stream = vm.machine.agent.exec(&request, FIRST_COMMAND_DEADLINE).await?;
        loop {
            match stream.next_frame().await? {
                Some(ExecFrame::Exit(exit)) if exit.code == 0 => return Ok(Ok(())),
                Some(ExecFrame::Exit(exit)) => return Ok(Err(format!("exit {}", exit.code))),
                Some(ExecFrame::Error(e)) => return Ok(Err(e.message)),
                Some(_) => {}
                None => return Ok(Err("ended without an exit".to_owned())),
            }
        }
    };
    match tokio::time::timeout(FIRST_COMMAND_DEADLINE, run).await {
        Err(_) => Err(problem("no end in time".to_owned())),
        Ok(Err::<Result<(), String>, AgentError>(e)) => Err(problem(e.to_string())),
        Ok(Ok(done)) => done.map_err(problem),
    }
}
