//! An agent served in this process over a socket pair, and a client for it.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use guest_agent::agent::{Agent, Config};
use guest_agent::client::AgentClient;
use guest_agent::transport::serve_session;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::task::LocalSet;

/// Deadline of every call that should be quick.
pub const SOON: Duration = Duration::from_secs(10);

/// Runs `test` with a client of an agent whose files are under `root` and which has no cgroup.
pub fn with_agent<F: Future<Output = ()>>(root: &Path, test: impl FnOnce(AgentClient) -> F) {
    let mut config = Config { root: root.to_owned(), cgroup: None, ..Config::default() };
    // An agent that looks at this very machine leaves nothing on it.
    if root == Path::new("/") {
        config.log = "/dev/null".into();
    }
    run(async move {
        let (host, guest) = UnixStream::pair().unwrap();
        let agent = Rc::new(Agent::new(config));
        tokio::task::spawn_local(async move {
            serve_session(guest, agent, false).await.unwrap();
        });
        let client = AgentClient::connect_session(host, SOON).await.unwrap();
        test(client).await;
    });
}

/// Runs a future on a thread like the agent's, with a deadline.
pub fn run<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let work = async { tokio::time::timeout(Duration::from_secs(60), test).await.unwrap() };
    LocalSet::new().block_on(&runtime, work);
}
