//! Runs a build's steps in its VM, one after the other, through the guest agent.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use guest_agent::client::{AgentClient, AgentError, RequestBody};
use guest_agent::wire::ExecRequest;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::{Method, Request};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio_util::io::ReaderStream;

use super::command::{self, Ended, Output, Service};
use super::log::{BuildLog, Kind};
use super::spec::{Command, Copy, Spec, Step};
use crate::engine::inputs::Inputs;
use crate::engine::template::{Failure, Template};

/// How long an archive may take to be unpacked.
const COPY_DEADLINE: Duration = Duration::from_secs(600);
/// How long the making of a folder may take.
const FOLDER_DEADLINE: Duration = Duration::from_secs(30);
/// A started command that ends at once ends within this.
const START_GRACE: Duration = Duration::from_millis(200);

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("step {} ({}): {problem}{}", failure.step, failure.what, tail(&failure.output))]
pub struct StepError {
    /// For the API.
    pub failure: Failure,
    /// What went wrong.
    pub problem: Problem,
}

/// What can go wrong in a step.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// Its command failed.
    #[error("ended with exit code {0}")]
    Exit(i32),
    /// It took too long.
    #[error("no end within {0:?}")]
    TimedOut(Duration),
    /// What it waits for did not come.
    #[error("{what} within {after:?}")]
    NeverCame {
        /// What did not happen.
        what: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// A command that was started has ended, which it should not.
    #[error("it was started to stay, and has ended")]
    StartedEnded,
    /// The guest refused or went away.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// An archive that was uploaded cannot be read any more.
    #[error("its archive: {0}")]
    Input(#[from] std::io::Error),
}

fn tail(output: &[String]) -> String {
    let mut text = String::new();
    if !output.is_empty() {
        let _ = write!(text, "; its output ends with:\n{}", output.join("\n"));
    }
    text
}

/// Runs steps.
#[derive(Debug)]
pub struct Runner<'a> {
    agent: &'a AgentClient,
    template: &'a Template,
    log: &'a BuildLog,
    inputs: &'a Inputs,
    env: BTreeMap<String, String>,
    cwd: Option<String>,
    user: Option<String>,
    services: Vec<Service>,
}

impl<'a> Runner<'a> {
    /// For a VM that has the variables `env` from its parent.
    pub fn new(
        agent: &'a AgentClient,
        template: &'a Template,
        log: &'a BuildLog,
        inputs: &'a Inputs,
        env: BTreeMap<String, String>,
    ) -> Self {
        let (cwd, user) = (None, None);
        Self { agent, template, log, inputs, env, cwd, user, services: Vec::new() }
    }

    /// Runs all but the checks, which need a clone.
    pub async fn run(&mut self, spec: &Spec) -> Result<(), StepError> {
        for (number, step) in (1..).zip(&spec.steps) {
            if matches!(step, Step::Check(_)) {
                self.remember(step);
                continue;
            }
            self.announce(number, step, spec.steps.len());
            let mut output = Output::new(self.log, number);
            if let Err(problem) = self.step(number, step, &mut output).await {
                if matches!(problem, Problem::StartedEnded) {
                    self.services_alive()?;
                }
                return Err(error(number, step, problem, output.tail()));
            }
        }
        self.services_alive()
    }

    /// Runs the checks; `agent` is the clone's.
    pub async fn check(&mut self, spec: &Spec) -> Result<(), StepError> {
        (self.cwd, self.user) = (None, None);
        for (number, step) in (1..).zip(&spec.steps) {
            let Step::Check(command) = step else {
                self.remember(step);
                continue;
            };
            self.announce(number, step, spec.steps.len());
            let mut output = Output::new(self.log, number);
            if let Err(problem) = self.command(command, &mut output).await {
                return Err(error(number, step, problem, output.tail()));
            }
        }
        Ok(())
    }

    fn announce(&self, number: usize, step: &Step, of: usize) {
        let what = step.summary();
        self.log.write(Kind::Step, Some(number), &what);
        self.template.update(|s| {
            s.step = Some(number);
            s.message = format!("step {number} of {of}: {what}");
        });
    }

    /// What a step changes about those that follow it.
    fn remember(&mut self, step: &Step) {
        match step {
            Step::Env(env) => self.env.extend(env.clone()),
            Step::Workdir(path) => self.cwd = Some(path.clone()),
            Step::User(user) => self.user = Some(user.clone()),
            _ => {}
        }
    }

    async fn step(
        &mut self,
        number: usize,
        step: &Step,
        output: &mut Output<'_>,
    ) -> Result<(), Problem> {
        match step {
            Step::Run(command) => self.command(command, output).await?,
            Step::Copy(copy) => self.copy(copy).await?,
            Step::Workdir(path) => {
                let argv = ["mkdir", "-p", "--", path].map(str::to_owned).to_vec();
                let request = ExecRequest { argv, user: self.user.clone(), ..Default::default() };
                self.to_zero(request, FOLDER_DEADLINE, output).await?;
            }
            Step::Start(command) => {
                let request = ExecRequest { background: true, ..self.request(command.text()) };
                let service = Service::start(self.agent, request, self.log, number, step).await?;
                self.services.push(service);
                tokio::time::sleep(START_GRACE).await;
                if self.services.last().is_some_and(|s| s.ended().is_some()) {
                    return Err(Problem::StartedEnded);
                }
            }
            Step::Wait(wait) => {
                let after = wait.timeout();
                let what = match (wait.port, &wait.command) {
                    (Some(port), _) => format!("port {port} was not open"),
                    _ => "the command did not end with 0".to_owned(),
                };
                let come = async {
                    match (wait.port, &wait.command) {
                        (Some(port), _) => command::port_open(self.agent, port).await,
                        (None, Some(command)) => {
                            command::until_zero(self.agent, &self.request(command), output).await
                        }
                        (None, None) => Ok(()),
                    }
                };
                tokio::select! {
                    come = tokio::time::timeout(after, come) => {
                        come.map_err(|_| Problem::NeverCame { what, after })??;
                    }
                    // There is no use in waiting for one that is gone.
                    () = command::any_ends(&self.services) => return Err(Problem::StartedEnded),
                }
            }
            Step::Env(_) | Step::User(_) | Step::Check(_) => {}
        }
        self.remember(step);
        Ok(())
    }

    fn request(&self, command: &str) -> ExecRequest {
        ExecRequest {
            argv: vec!["/bin/sh".to_owned(), "-c".to_owned(), command.to_owned()],
            env: self.env.clone(),
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            ..ExecRequest::default()
        }
    }

    async fn command(&self, command: &Command, output: &mut Output<'_>) -> Result<(), Problem> {
        self.to_zero(self.request(command.text()), command.timeout(), output).await
    }

    async fn to_zero(
        &self,
        mut request: ExecRequest,
        timeout: Duration,
        output: &mut Output<'_>,
    ) -> Result<(), Problem> {
        request.timeout_seconds = Some(timeout.as_secs_f64());
        match command::run(self.agent, &request, timeout, output).await? {
            Ended::Exit(0) => Ok(()),
            Ended::Exit(code) => Err(Problem::Exit(code)),
            Ended::TimedOut => Err(Problem::TimedOut(timeout)),
        }
    }

    /// Unpacks an archive as the guest's files API does it.
    async fn copy(&self, copy: &Copy) -> Result<(), Problem> {
        let file = tokio::fs::File::open(self.inputs.path(&copy.archive_sha256)).await?;
        let pieces =
            futures_util::StreamExt::map(ReaderStream::with_capacity(file, 64 << 10), |p| {
                p.map(Frame::data).map_err(|e| Box::new(e) as _)
            });
        let body: RequestBody = StreamBody::new(pieces).boxed_unsync();
        let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let mut uri = format!("/files?path={}", encode(&copy.dst));
        if let Some(user) = &self.user {
            let _ = write!(uri, "&user={}", encode(user));
        }
        let request = Request::builder()
            .method(Method::PUT)
            .uri(uri)
            .header(hyper::header::CONTENT_TYPE, "application/x-tar")
            .body(body)
            .map_err(|e| AgentError::Protocol(format!("copy: {e}")))?;
        let sent = async {
            let answer = self.agent.send(request).await?;
            let status = answer.status();
            if status.is_success() {
                return Ok(());
            }
            let bytes = answer.into_body().collect().await;
            let bytes = bytes.map(http_body_util::Collected::to_bytes).unwrap_or_default();
            Err(AgentError::refused(status, &bytes))
        };
        let sent = tokio::time::timeout(COPY_DEADLINE, sent).await;
        Ok(sent.map_err(|_| Problem::TimedOut(COPY_DEADLINE))??)
    }

    /// Fails when a command that was started to stay has ended, in the words of that one's step.
    fn services_alive(&self) -> Result<(), StepError> {
        let Some((service, code)) = self.services.iter().find_map(|s| Some((s, s.ended()?))) else {
            return Ok(());
        };
        let failure = Failure {
            step: service.step,
            what: service.what.clone(),
            exit_code: Some(code),
            output: service.tail(),
        };
        Err(StepError { failure, problem: Problem::StartedEnded })
    }
}

fn error(number: usize, step: &Step, problem: Problem, output: Vec<String>) -> StepError {
    let exit_code = match problem {
        Problem::Exit(code) => Some(code),
        _ => None,
    };
    let failure = Failure { step: number, what: step.summary(), exit_code, output };
    StepError { failure, problem }
}
