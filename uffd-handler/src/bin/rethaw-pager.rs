//! The page server process: `rethaw-pager --socket PATH`.
//!
//! Prints one line, `ready`, to standard output once it can be connected to. It outlives the
//! service that started it, and ends by itself when it has had no VM and no service for a while.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use uffd_handler::log_file::StderrLog;
use uffd_handler::pager::{PagerConfig, SpinPolicy, run};

/// Serves the memory of lazily restored VMs.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Control socket to listen on.
    #[arg(long)]
    socket: PathBuf,
    /// Seconds to stay without a VM and without a service.
    #[arg(long, default_value_t = 30)]
    idle_exit_seconds: u64,
    /// Microseconds to wait for a guest's next fault without sleeping; 0 always sleeps.
    #[arg(long, default_value_t = 100)]
    spin_micros: u64,
    /// File to log to, also what goes to standard error otherwise; at 16 MiB it becomes `FILE.1`.
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Log filter, such as `info` or `uffd_handler=debug`.
    #[arg(long, default_value = "info")]
    log_level: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&arguments.log_level))
        .with_ansi(false);
    match arguments.log.as_deref().map(StderrLog::open).transpose() {
        Ok(None) => log.with_writer(std::io::stderr).init(),
        Ok(Some(file)) => log.with_writer(Mutex::new(file)).init(),
        Err(error) => {
            log.with_writer(std::io::stderr).init();
            tracing::error!(%error, "log file");
        }
    }
    // A thread that panics must not leave its VM standing still: the whole process goes, and the
    // service starts another one that takes all VMs over.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
    // The last process to kill when memory is short: every guest stands still without it.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-900") {
        tracing::debug!(%error, "oom_score_adj");
    }
    let config = PagerConfig {
        socket: arguments.socket,
        idle_exit: Duration::from_secs(arguments.idle_exit_seconds),
        spin: SpinPolicy::for_this_machine(Duration::from_micros(arguments.spin_micros)),
    };
    match run(&config, announce) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "page server cannot run");
            ExitCode::FAILURE
        }
    }
}

/// Says that connections are accepted now, to whoever listens.
fn announce() {
    if let Err(error) = writeln!(std::io::stdout(), "ready") {
        tracing::debug!(%error, "nobody wants to know that the page server is ready");
    }
}
