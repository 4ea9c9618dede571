//! What the agent tells about the machine and its users, through a real agent and client.
#![cfg(feature = "client")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{SOON, with_agent};
use guest_agent::client::AgentError;
use guest_agent::wire::{Usage, UserInfo};
use hyper::http::Method;
use std::path::Path;

#[test]
fn usage_is_looked_at() {
    with_agent(Path::new("/"), |client| async move {
        for _ in 0..2 {
            let now: Usage = client.call(Method::GET, "/usage", None::<&()>, SOON).await.unwrap();
            assert!(now.cpu_count >= 1 && (0.0..=100.0).contains(&now.cpu_used_percent), "{now:?}");
            assert!((1..now.memory_bytes).contains(&now.memory_used_bytes), "{now:?}");
            assert!((1..=now.disk_bytes).contains(&now.disk_used_bytes), "{now:?}");
        }
    });
}

#[test]
fn users_are_found_by_name() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("etc")).unwrap();
    let passwd = "user:x:1000:1001::/home/user:/bin/bash\n";
    std::fs::write(root.path().join("etc/passwd"), passwd).unwrap();
    with_agent(root.path(), |client| async move {
        let path = "/user?name=user";
        let user: UserInfo = client.call(Method::GET, path, None::<&()>, SOON).await.unwrap();
        assert_eq!((user.uid, user.gid, user.home.as_str()), (1000, 1001, "/home/user"));
        let path = "/user?name=nobody-here";
        let none = client.call::<(), UserInfo>(Method::GET, path, None, SOON).await;
        let Err(AgentError::Refused { status, error_code, .. }) = none else { panic!("{none:?}") };
        assert_eq!((status, error_code.as_str()), (422, "user_not_found"));
    });
}

#[test]
fn the_log_says_for_which_request_it_was_asked() {
    let root = tempfile::tempdir().unwrap();
    guest_agent::client::name_requests(|| Some("the-users-request".to_owned()));
    with_agent(root.path(), |client| async move {
        client.health(SOON).await.unwrap();
        let none = client.call::<(), Usage>(Method::GET, "/nothing?of=this", None, SOON).await;
        assert!(matches!(none, Err(AgentError::Refused { status: 404, .. })), "{none:?}");
    });
    let text = std::fs::read_to_string(root.path().join("run/rethaw/agent.log")).unwrap();
    let [_, request, method, path, status, _] = text.split_whitespace().collect::<Vec<_>>()[..]
    else {
        panic!("{text}");
    };
    assert_eq!((request, method, path, status), ("the-users-request", "GET", "/nothing", "404"));
}
