//! Starts a page server, or finds the one that is running.

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use thiserror::Error;

use super::SupervisorConfig;
use super::link::{self, RequestError};
use crate::control::{self, Channel, ChannelError, Event, PROTOCOL_VERSION, Reply, Request};
use crate::{fdpass, pidfd};

/// Attempts at reaching or starting a page server, and the pause between two.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(100);

/// Why there is no page server.
#[derive(Debug, Error)]
pub enum StartError {
    /// The binary cannot be run.
    #[error("{binary}: {source}")]
    Spawn {
        /// The binary.
        binary: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// It ended or kept silent instead of getting ready.
    #[error("{binary} did not get ready within {waited:?}; its log says why")]
    NotReady {
        /// The binary.
        binary: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// The control channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// It speaks another version of the protocol.
    #[error(
        "page server {pid} speaks version {theirs} of the protocol, this service {PROTOCOL_VERSION}"
    )]
    Version {
        /// Its process id.
        pid: i32,
        /// Its version.
        theirs: u32,
    },
    /// It did not answer as it should.
    #[error("page server on {socket}: {reason}")]
    Conversation {
        /// Its socket.
        socket: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// The supervisor's thread cannot be started.
    #[error("thread: {0}")]
    Thread(std::io::Error),
    /// A log file or a process handle cannot be opened.
    #[error("{what}: {source}")]
    Io {
        /// What was opened.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
}

impl StartError {
    pub(super) fn conversation(config: &SupervisorConfig, reason: &dyn std::fmt::Display) -> Self {
        Self::Conversation { socket: config.socket.clone(), reason: reason.to_string() }
    }
}

/// A page server that answers.
pub(super) struct Running {
    pub(super) channel: Channel,
    pub(super) pid: i32,
    /// Set when this process is its parent and has to reap it.
    pub(super) child: Option<Child>,
    /// What it said in between.
    pub(super) events: Vec<Event>,
}

/// The page server on the socket, else a new one; and whether it was there. One that is being killed
/// right now may still take a connection, or stand in the way of the new one for a moment.
pub(super) fn find_or_launch(config: &SupervisorConfig) -> Result<(Running, bool), StartError> {
    let mut tries = 0;
    loop {
        tries += 1;
        let found = match find(config) {
            Ok(Some(running)) => Ok((running, true)),
            Ok(None) => launch(config).map(|running| (running, false)),
            Err(error) => Err(error),
        };
        match found {
            Err(StartError::Conversation { .. } | StartError::NotReady { .. }) if tries < TRIES => {
                std::thread::sleep(PAUSE);
            }
            found => return found,
        }
    }
}

/// The page server on the socket, if there is one. One of another version, as an upgrade of the
/// service finds it, is ended: its VMs then stand still until they are recovered like those of a page
/// server that was killed.
fn find(config: &SupervisorConfig) -> Result<Option<Running>, StartError> {
    let Some(channel) = control::connect(&config.socket)? else { return Ok(None) };
    let listener = getsockopt(&channel, PeerCredentials).map(|who| who.pid());
    match greet(config, channel, None) {
        // Whoever listens there is who answered, and not a process that it names.
        Err(StartError::Version { pid, theirs }) if listener == Ok(pid) => {
            tracing::warn!(pid, theirs, "page server of another version: ending it");
            end_other(pid, Instant::now() + config.deadline)?;
            Ok(None)
        }
        found => found.map(Some),
    }
}

/// Kills a page server that is no child of this process, and waits until it is gone.
fn end_other(pid: i32, deadline: Instant) -> Result<(), StartError> {
    let io = |what| move |source| StartError::Io { what: format!("{what} {pid}"), source };
    let handle = pidfd::open(pid).map_err(io("page server"))?;
    pidfd::send_signal(handle.as_fd(), Signal::SIGKILL).map_err(io("killing page server"))?;
    match fdpass::wait_for(handle.as_fd(), PollFlags::POLLIN, deadline) {
        Ok(true) => Ok(()),
        Ok(false) => Err(io("killed page server")(std::io::ErrorKind::TimedOut.into())),
        Err(errno) => Err(io("waiting for page server")(errno.into())),
    }
}

/// Starts a page server in a process group of its own and waits until it is ready.
fn launch(config: &SupervisorConfig) -> Result<Running, StartError> {
    let deadline = Instant::now() + config.deadline;
    let mut command = Command::new(&config.binary);
    command
        .arg("--socket")
        .arg(&config.socket)
        .args(["--idle-exit-seconds", &config.idle_exit.as_secs().max(1).to_string()])
        .args(["--spin-micros", &config.spin.as_micros().to_string()])
        .args(["--log-level", &config.log_level])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    if let Some(log) = &config.log {
        command.arg("--log").arg(log);
    }
    // A group of its own: a signal to the service's terminal or group must not reach it. Not a session
    // of its own: the kernel would then share out the CPU between it and the VMs as if they were two
    // users (`CONFIG_SCHED_AUTOGROUP`), and no priority would count between them.
    command.process_group(0);
    let spawned = command.spawn();
    let mut child =
        spawned.map_err(|source| StartError::Spawn { binary: config.binary.clone(), source })?;
    let ready = child.stdout.take().is_some_and(|stdout| {
        // Ready means one line; end-of-file means that it ended.
        fdpass::wait_for(stdout.as_fd(), PollFlags::POLLIN, deadline) == Ok(true)
            && BufReader::new(stdout).lines().next().is_some_and(|line| line.is_ok())
    });
    let channel = if ready { control::connect(&config.socket)? } else { None };
    match channel {
        Some(channel) => greet(config, channel, Some(child)),
        None => {
            end(&mut child);
            Err(StartError::NotReady { binary: config.binary.clone(), waited: config.deadline })
        }
    }
}

fn greet(
    config: &SupervisorConfig,
    channel: Channel,
    child: Option<Child>,
) -> Result<Running, StartError> {
    let mut events = Vec::new();
    let hello = Request::Hello { version: PROTOCOL_VERSION };
    let deadline = Instant::now() + config.deadline;
    match link::ask(&channel, hello, &[], deadline, &mut events) {
        Ok((Reply::Hello { version, pid }, _)) if version == PROTOCOL_VERSION => {
            Ok(Running { channel, pid, child, events })
        }
        Ok((Reply::Hello { version: theirs, pid }, _)) => Err(StartError::Version { pid, theirs }),
        Ok((reply, _)) => {
            Err(StartError::conversation(config, &format!("{reply:?} to a greeting")))
        }
        Err(RequestError::Channel(error)) => Err(error.into()),
        Err(error) => Err(StartError::conversation(config, &error)),
    }
}

/// Kills and reaps a page server that never got going.
fn end(child: &mut Child) {
    // Both fail only when it has ended already.
    let _ = child.kill();
    let _ = child.wait();
}
