//! E2B's own SDKs, unmodified and at pinned versions, against the real service: their scenarios
//! are in `tests/sdk`, each told in a line.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::sync::OnceCell;

use crate::home::cache;
use crate::service::Service;

/// Installing the SDKs takes a minute or two where there is no cache.
const INSTALL_DEADLINE: Duration = Duration::from_secs(10 * 60);
/// All scenarios of one SDK.
const STORY_DEADLINE: Duration = Duration::from_secs(10 * 60);

static SDKS: OnceCell<PathBuf> = OnceCell::const_new();

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Where the SDKs are; installed by the first test to come.
async fn sdks() -> &'static Path {
    let install = async || {
        let mut script = Command::new(root().join("scripts/get-sdks"));
        script.env("RETHAW_HOME", cache()).stdin(Stdio::null()).kill_on_drop(true);
        let done = tokio::time::timeout(INSTALL_DEADLINE, script.output()).await;
        let done = done.expect("the SDKs are not installed in time").unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        PathBuf::from(String::from_utf8(done.stdout).unwrap().trim())
    };
    SDKS.get_or_init(install).await
}

/// Runs a story of `tests/sdk` against the service; all of its scenarios must hold.
async fn tell(service: &Service, program: &Path, story: &str) {
    let key = service.key();
    // Older SDKs take only keys that look like E2B's.
    let key = key.strip_prefix("rtw_").map_or(key.clone(), |secret| format!("e2b_{secret}"));
    let url = service.client().url();
    let mut command = Command::new(program);
    command
        .arg(root().join("tests/sdk").join(story))
        .env("E2B_API_KEY", key)
        .env("E2B_API_URL", url)
        .env("E2B_SANDBOX_URL", url)
        .env("SDK_DIR", sdks().await.join("js"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let done = tokio::time::timeout(STORY_DEADLINE, command.output()).await;
    let done = done.unwrap_or_else(|_| panic!("{story} does not end")).unwrap();
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{story}: {}\n{out}\n{err}", done.status);
    assert!(out.contains("\nok create") || out.contains("\nok commands_side_by_side"), "{out}");
    eprintln!("{out}");
}

async fn python(version: &str) {
    let python = sdks().await.join(format!("py-{version}/bin/python"));
    let service = Service::start(1).await;
    tell(&service, &python, "e2b_sync.py").await;
    tell(&service, &python, "e2b_async.py").await;
    service.stop().await;
}

#[tokio::test]
async fn the_python_sdk_works() {
    python("2.63.0").await;
}

#[tokio::test]
async fn an_older_python_sdk_works() {
    python("2.45.1").await;
}

#[tokio::test]
async fn the_javascript_sdk_works() {
    let node = sdks().await.join("node/bin/node");
    let service = Service::start(1).await;
    tell(&service, &node, "e2b.mjs").await;
    service.stop().await;
}
