//! Files and folders, in and out.

use std::collections::BTreeMap;
use std::io::Read;

use rand::RngCore;

use crate::client::Reply;
use crate::service::Service;

const TAR: &str = "application/x-tar";

fn path_of(id: &str, path: &str) -> String {
    format!("/v1/sandboxes/{id}/files?path={path}")
}

async fn put(service: &Service, id: &str, path: &str, bytes: Vec<u8>) -> Reply {
    let kind = [("content-type", "application/octet-stream")];
    service.client().send("PUT", &path_of(id, path), &kind, bytes).await
}

async fn get(service: &Service, id: &str, path: &str) -> Reply {
    service.client().get(&path_of(id, path)).await
}

#[tokio::test]
async fn bytes_come_back_as_they_went() {
    let service = Service::start(1).await;
    let id = service.create().await;
    let mut random = vec![0_u8; 5 << 20];
    rand::rng().fill_bytes(&mut random);
    for (name, bytes) in [
        ("empty", Vec::new()),
        ("one", vec![0xff]),
        ("much", random),
        ("with%20space", b"x".into()),
    ] {
        let path = format!("/srv/new/{name}");
        let done = put(&service, &id, &path, bytes.clone()).await;
        assert!((200..300).contains(&done.status), "{name}: {} {}", done.status, done.text());
        let back = get(&service, &id, &path).await;
        assert_eq!(back.status, 200, "{name}");
        assert_eq!(back.headers["content-length"], bytes.len().to_string().as_str());
        assert!(back.body == bytes, "{name}: {} bytes came back", back.body.len());
    }
    assert_eq!(
        service.sh(&id, "stat -c %s '/srv/new/with space' /srv/new/much").await,
        "1\n5242880"
    );
    // Shorter than what was there: nothing of it may be left.
    put(&service, &id, "/srv/new/much", b"short".into()).await;
    assert_eq!(get(&service, &id, "/srv/new/much").await.body, "short");

    assert_eq!(service.client().delete(&path_of(&id, "/srv/new/one")).await.status, 204);
    get(&service, &id, "/srv/new/one").await.refused(404, "file_not_found");
    service.stop().await;
}

#[tokio::test]
async fn folders_travel_as_archives() {
    let service = Service::start(1).await;
    let id = service.create().await;
    let mut archive = tar::Builder::new(Vec::new());
    for (name, text) in [("a.txt", "alpha"), ("deep/er/b.txt", "beta")] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o750);
        archive.append_data(&mut header, name, text.as_bytes()).unwrap();
    }
    let archive = archive.into_inner().unwrap();
    let to = path_of(&id, "/srv/tree");
    let done = service.client().send("PUT", &to, &[("content-type", TAR)], archive).await;
    assert!((200..300).contains(&done.status), "{} {}", done.status, done.text());
    assert_eq!(service.sh(&id, "cd /srv/tree; cat a.txt deep/er/b.txt").await, "alphabeta");
    assert_eq!(service.sh(&id, "stat -c %a /srv/tree/a.txt").await, "750");

    service.sh(&id, "ln -s a.txt /srv/tree/link").await;
    let back = service.client().send("GET", &to, &[("accept", TAR)], "").await;
    assert_eq!((back.status, back.headers["content-type"].to_str().unwrap()), (200, TAR));
    let mut found = BTreeMap::new();
    for entry in tar::Archive::new(&*back.body).entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let name = name.trim_start_matches("./").trim_end_matches('/').to_owned();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        let link = entry.link_name().unwrap().map(|to| to.display().to_string());
        found.insert(name, link.unwrap_or(text));
    }
    for (name, text) in [("a.txt", "alpha"), ("deep/er/b.txt", "beta"), ("link", "a.txt")] {
        assert_eq!(found.get(name).map(String::as_str), Some(text), "{found:?}");
    }

    get(&service, &id, "/srv/tree").await.refused(409, "is_a_directory");
    let full = service.client().delete(&to).await;
    assert_eq!(full.status, 409, "{}", full.text());
    assert_eq!(service.client().delete(&format!("{to}&recursive=true")).await.status, 204);
    assert_eq!(service.sh(&id, "ls /srv").await, "");
    service.stop().await;
}

#[tokio::test]
async fn paths_that_lead_elsewhere_are_refused() {
    let service = Service::start(1).await;
    let id = service.create().await;
    for bad in
        ["relative", "../etc/passwd", "/srv/../etc/passwd", "/srv/%2e%2e/etc/passwd", "/a%00b"]
    {
        for method in ["GET", "PUT", "DELETE"] {
            let reply = service.client().send(method, &path_of(&id, bad), &[], "").await;
            reply.refused(400, "invalid_path");
        }
    }
    let reply = service.client().get(&format!("/v1/sandboxes/{id}/files")).await;
    assert!(reply.refused(422, "invalid_field").contains("path"));
    get(&service, &id, "/nothing/here").await.refused(404, "file_not_found");
    service.client().delete(&path_of(&id, "/nope")).await.refused(404, "file_not_found");

    // An archive may not write outside the folder it is unpacked into.
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..13].copy_from_slice(b"../escape.txt");
    header.set_size(3);
    header.set_mode(0o644);
    header.set_cksum();
    let mut archive = tar::Builder::new(Vec::new());
    archive.append(&header, &b"out"[..]).unwrap();
    let archive = archive.into_inner().unwrap();
    let to = path_of(&id, "/srv/tree");
    let reply = service.client().send("PUT", &to, &[("content-type", TAR)], archive).await;
    assert!((400..500).contains(&reply.status), "{} {}", reply.status, reply.text());
    assert_eq!(service.sh(&id, "test -e /srv/escape.txt || echo no").await, "no");

    // Neither may a pipe that nobody writes to hold anything up.
    service.sh(&id, "mkfifo /tmp/pipe").await;
    get(&service, &id, "/tmp/pipe").await.refused(409, "not_a_file");
    service.stop().await;
}
