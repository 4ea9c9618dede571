//! Watched folders through a real agent and client, in one process.
#![cfg(feature = "client")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{SOON, with_agent};
use guest_agent::client::{AgentClient, AgentError, full_body};
use guest_agent::wire::{WatchEvent, WatchEvents, WatchKind, WatchRequest, WatcherId};
use http_body_util::BodyExt;
use hyper::http::{Method, Request};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn request(path: &str, recursive: bool) -> WatchRequest {
    WatchRequest { path: path.to_owned(), recursive, entries: false, network: false }
}

async fn add(client: &AgentClient, request: &WatchRequest) -> Result<String, AgentError> {
    let made = client.call::<_, WatcherId>(Method::POST, "/watchers", Some(request), SOON).await;
    made.map(|made| made.id)
}

async fn take(client: &AgentClient, id: &str) -> Vec<WatchEvent> {
    let path = format!("/watchers/{id}");
    let noted: WatchEvents = client.call(Method::GET, &path, None::<&()>, SOON).await.unwrap();
    noted.items
}

/// Collects until all of these were noted; gives everything that was.
async fn until(client: &AgentClient, id: &str, wanted: &[(&str, WatchKind)]) -> Vec<WatchEvent> {
    let mut all = Vec::new();
    loop {
        all.extend(take(client, id).await);
        let seen: BTreeSet<_> = all.iter().map(|e| (e.name.as_str(), e.kind as u8)).collect();
        if wanted.iter().all(|(name, kind)| seen.contains(&(*name, *kind as u8))) {
            return all;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

fn refused(result: Result<String, AgentError>) -> (u16, String) {
    match result {
        Err(AgentError::Refused { status, error_code, .. }) => (status, error_code),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_happens_below_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_owned();
    fs::create_dir(root.join("old")).unwrap();
    with_agent(Path::new("/"), |client| async move {
        let id = add(&client, &request(root.to_str().unwrap(), true)).await.unwrap();
        assert_eq!(take(&client, &id).await, [], "what was there before is no event");
        fs::write(root.join("a"), "1").unwrap();
        fs::create_dir_all(root.join("new/er")).unwrap();
        fs::write(root.join("new/er/b"), "2").unwrap();
        fs::rename(root.join("a"), root.join("old/a")).unwrap();
        fs::remove_file(root.join("old/a")).unwrap();
        use WatchKind::{Create, Remove, Rename, Write};
        let wanted = [
            ("a", Create),
            ("a", Write),
            ("a", Rename),
            ("old/a", Create),
            ("old/a", Remove),
            ("new", Create),
            ("new/er", Create),
            ("new/er/b", Create),
        ];
        until(&client, &id, &wanted).await;
        // Still watched at its new place, and no more at the old one.
        fs::rename(root.join("new"), root.join("moved")).unwrap();
        until(&client, &id, &[("new", Rename), ("moved", Create)]).await;
        fs::write(root.join("moved/er/c"), "3").unwrap();
        let told = until(&client, &id, &[("moved/er/c", Create)]).await;
        assert!(told.iter().all(|e| !e.name.starts_with("new")), "{told:?}");
        let path = format!("/watchers/{id}");
        client.call::<(), ()>(Method::DELETE, &path, None, SOON).await.unwrap();
        let gone = client.call::<(), WatchEvents>(Method::GET, &path, None, SOON).await;
        assert_eq!(refused(gone.map(|_| String::new())), (404, "watcher_not_found".to_owned()));
    });
}

#[test]
fn an_upload_shows_as_a_file_that_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_owned();
    with_agent(Path::new("/"), |client| async move {
        let wish = WatchRequest { entries: true, ..request(root.to_str().unwrap(), false) };
        let id = add(&client, &wish).await.unwrap();
        let put = Request::put(format!("/files?path={}/up", root.display()));
        let put = put.header("x-metadata-from", "test").body(full_body("12345")).unwrap();
        assert_eq!(client.send(put).await.unwrap().status(), 200);
        let told = until(&client, &id, &[("up", WatchKind::Write)]).await;
        let kinds: Vec<_> = told.iter().map(|e| (e.name.as_str(), e.kind)).collect();
        assert_eq!(kinds, [("up", WatchKind::Create), ("up", WatchKind::Write)]);
        let entry = told[1].entry.as_ref().unwrap();
        assert_eq!((entry.size_bytes, entry.metadata["from"].as_str()), (5, "test"));
    });
}

#[test]
fn a_stream_tells_as_it_happens() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_owned();
    with_agent(Path::new("/"), |client| async move {
        let watch = Request::get(format!("/watch?path={}", root.display()));
        let answer = client.send(watch.body(full_body("")).unwrap()).await.unwrap();
        assert_eq!(answer.status(), 200);
        let mut body = answer.into_body();
        fs::create_dir(root.join("made")).unwrap();
        let line = body.frame().await.unwrap().unwrap().into_data().unwrap();
        let event: WatchEvent = serde_json::from_slice(&line).unwrap();
        assert_eq!((event.name.as_str(), event.kind), ("made", WatchKind::Create));
        // What is below is not asked for.
        fs::write(root.join("made/below"), "").unwrap();
        fs::remove_dir_all(&root).unwrap();
        let mut rest = Vec::new();
        while !String::from_utf8_lossy(&rest).contains(r#""name":"","kind":"remove""#) {
            rest.extend_from_slice(&body.frame().await.unwrap().unwrap().into_data().unwrap());
        }
        assert!(!String::from_utf8_lossy(&rest).contains("below"));
    });
    // The folder is gone already.
    std::mem::forget(dir);
}

#[test]
fn what_cannot_be_watched_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_owned();
    fs::write(root.join("file"), "").unwrap();
    with_agent(Path::new("/"), |client| async move {
        let none = add(&client, &request("/no/such/folder", false)).await;
        assert_eq!(refused(none), (404, "file_not_found".to_owned()));
        let file = add(&client, &request(root.join("file").to_str().unwrap(), false)).await;
        assert_eq!(refused(file), (409, "not_a_directory".to_owned()));
        let relative = add(&client, &request("tmp", false)).await;
        assert_eq!(refused(relative), (400, "invalid_path".to_owned()));
        let mut ids = Vec::new();
        let too_many = loop {
            match add(&client, &request(root.to_str().unwrap(), false)).await {
                Ok(id) => ids.push(id),
                error => break error,
            }
        };
        assert_eq!(refused(too_many), (429, "too_many_watches".to_owned()));
        assert_eq!(ids.len(), 64);
    });
}
