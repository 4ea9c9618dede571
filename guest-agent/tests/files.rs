//! Files, folders, archives and tunnels through a real agent and client, in one process.
#![cfg(feature = "client")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use bytes::Bytes;
use common::{SOON, with_agent};
use guest_agent::client::{AgentClient, RequestBody, full_body};
use guest_agent::wire::{DirEntries, DirEntry, EntryKind, ErrorBody, MkdirRequest, MoveRequest};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::http::{Method, Request};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const TAR: &str = "application/x-tar";

fn encode(path: &str) -> String {
    path.bytes().map(|b| format!("%{b:02x}")).collect()
}

async fn raw(
    client: &AgentClient,
    method: Method,
    uri: &str,
    kind: Option<&str>,
    body: RequestBody,
) -> (u16, Bytes) {
    let mut request = Request::builder().method(method).uri(uri);
    if let Some(kind) = kind {
        request = request.header("accept", kind).header("content-type", kind);
    }
    let answer = client.send(request.body(body).unwrap()).await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.into_body().collect().await.unwrap().to_bytes())
}

async fn get(client: &AgentClient, path: &str) -> (u16, Bytes) {
    let uri = format!("/files?path={}", encode(path));
    raw(client, Method::GET, &uri, None, full_body(Bytes::new())).await
}

async fn put(client: &AgentClient, path: &str, more: &str, body: &[u8]) -> (u16, Bytes) {
    let uri = format!("/files?path={}{more}", encode(path));
    raw(client, Method::PUT, &uri, None, full_body(body.to_vec())).await
}

fn code((status, body): (u16, Bytes)) -> (u16, String) {
    let error: ErrorBody = serde_json::from_slice(&body).unwrap_or_else(|_| panic!("{body:?}"));
    (status, error.error_code)
}

fn no_uploads_left(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        assert!(!name.starts_with(".rethaw-upload"), "{name} was left behind");
    }
}

#[test]
fn what_goes_up_comes_down() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().to_str().unwrap().to_owned();
    with_agent(Path::new("/"), |client| async move {
        let big: Vec<u8> = (0..5_000_000u32).map(|i| (i % 251) as u8).collect();
        let ones = vec![0xff; 300_000];
        for (name, body) in [("empty", &[][..]), ("sub/deep/grüße", &big), ("ones", &ones)] {
            let path = format!("{base}/{name}");
            let (status, entry) = put(&client, &path, "", body).await;
            assert_eq!(status, 200, "{entry:?}");
            let entry: DirEntry = serde_json::from_slice(&entry).unwrap();
            assert_eq!((entry.size_bytes, entry.mode), (body.len() as u64, 0o644));
            let (status, got) = get(&client, &path).await;
            assert_eq!((status, got == body), (200, true), "{name}");
        }
        let path = format!("{base}/owned/file");
        assert_eq!(put(&client, &path, "&user=daemon&mode=750", b"x").await.0, 200);
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (1, 1, 0o750));
        assert_eq!(fs::metadata(format!("{base}/owned")).unwrap().uid(), 1);
        // Overwriting keeps what the owner has set.
        assert_eq!(put(&client, &path, "", b"longer").await.0, 200);
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o7777, meta.len()), (1, 0o750, 6));
        no_uploads_left(Path::new(&base));
    });
}

#[test]
fn every_refusal_has_its_code() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().to_str().unwrap().to_owned();
    fs::write(dir.path().join("file"), "x").unwrap();
    nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    with_agent(Path::new("/"), |client| async move {
        for path in ["relative", "", "/a/../etc/passwd", "/tmp/./x", "/.."] {
            assert_eq!(code(get(&client, path).await), (400, "invalid_path".into()), "{path}");
            assert_eq!(code(put(&client, path, "", b"").await), (400, "invalid_path".into()));
        }
        let missing = format!("{base}/none");
        assert_eq!(code(get(&client, &missing).await), (404, "file_not_found".into()));
        assert_eq!(code(get(&client, &base).await), (409, "is_a_directory".into()));
        assert_eq!(code(put(&client, &base, "", b"").await), (409, "is_a_directory".into()));
        let pipe = format!("{base}/pipe");
        assert_eq!(code(get(&client, &pipe).await), (409, "not_a_file".into()));
        let below = format!("{base}/file/below");
        assert_eq!(code(put(&client, &below, "", b"").await), (409, "not_a_directory".into()));
        let user = put(&client, &missing, "&user=no-such-user", b"").await;
        assert_eq!(code(user), (422, "user_not_found".into()));
        let mode = put(&client, &missing, "&mode=999", b"").await;
        assert_eq!(code(mode), (400, "invalid_request".into()));
        let nowhere = raw(&client, Method::GET, "/nowhere", None, full_body(Bytes::new())).await;
        assert_eq!(code(nowhere), (404, "not_found".into()));
        let post = raw(&client, Method::POST, "/files", None, full_body(Bytes::new())).await;
        assert_eq!(code(post), (405, "method_not_allowed".into()));
    });
}

#[test]
fn a_full_disk_is_said_to_be_full() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let work = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(none, "/", none, private, none).unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("t"), &path, Some("tmpfs"), flags, Some("size=256k")).unwrap();
        with_agent(Path::new("/"), |client| async move {
            let file = format!("{}/file", path.display());
            assert_eq!(put(&client, &file, "", b"small").await.0, 200);
            let full = put(&client, &file, "", &vec![7; 1_000_000]).await;
            assert_eq!(code(full), (507, "disk_full".into()));
            assert_eq!(fs::read(&file).unwrap(), b"small", "the old contents stay");
            no_uploads_left(&path);
        });
    };
    std::thread::spawn(work).join().unwrap();
}

#[test]
fn a_broken_upload_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "old").unwrap();
    with_agent(Path::new("/"), |client| async move {
        let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(4);
        let mut receiver = Some(receiver);
        let stream = futures_util::stream::poll_fn(move |cx| {
            let polled = receiver.as_mut().unwrap().poll_recv(cx);
            polled.map(|piece| match piece {
                Some(piece) => Some(Ok(Frame::data(piece))),
                None => Some(Err("the client broke".into())),
            })
        });
        let body = StreamBody::new(stream).boxed_unsync();
        let uri = format!("/files?path={}", encode(path.to_str().unwrap()));
        let request = Request::builder().method(Method::PUT).uri(uri).body(body).unwrap();
        let sending = tokio::task::spawn_local({
            let client = client.clone();
            async move { client.send(request).await.map(|a| a.status()) }
        });
        sender.send(Bytes::from_static(b"half of the new conte")).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        drop(sender);
        assert!(sending.await.unwrap().is_err());
        client.health(SOON).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        no_uploads_left(path.parent().unwrap());
    });
}

#[test]
fn folders_are_listed_made_moved_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().to_str().unwrap().to_owned();
    with_agent(Path::new("/"), |client| async move {
        let mkdir = MkdirRequest { path: format!("{base}/a/b"), user: None };
        let made: DirEntry = client.call(Method::POST, "/dir", Some(&mkdir), SOON).await.unwrap();
        assert_eq!(made.kind, EntryKind::Directory);
        let again = client.call::<_, DirEntry>(Method::POST, "/dir", Some(&mkdir), SOON).await;
        assert!(format!("{again:?}").contains("already_exists"), "{again:?}");
        put(&client, &format!("{base}/a/b/c"), "", b"123").await;
        symlink("b/c", format!("{base}/a/link")).unwrap();
        let uri = format!("/dir?path={}&depth=2", encode(&format!("{base}/a")));
        let list: DirEntries = client.call(Method::GET, &uri, None::<&()>, SOON).await.unwrap();
        let names: Vec<_> = list.items.iter().map(|e| (e.name.as_str(), e.kind)).collect();
        let wanted =
            [("b", EntryKind::Directory), ("c", EntryKind::File), ("link", EntryKind::Symlink)];
        assert_eq!(names, wanted);
        assert_eq!(list.items[2].target.as_deref(), Some("b/c"));
        let rename =
            MoveRequest { from: format!("{base}/a/b"), to: format!("{base}/x/y"), user: None };
        let _: DirEntry = client.call(Method::POST, "/move", Some(&rename), SOON).await.unwrap();
        assert_eq!(get(&client, &format!("{base}/x/y/c")).await.1, "123");
        let inside =
            MoveRequest { to: format!("{base}/x/y/z"), from: format!("{base}/x"), user: None };
        let error = client.call::<_, DirEntry>(Method::POST, "/move", Some(&inside), SOON).await;
        assert!(format!("{error:?}").contains("invalid_path"), "{error:?}");
        let stat = format!("/stat?path={}", encode(&format!("{base}/x/y/c")));
        let entry: DirEntry = client.call(Method::GET, &stat, None::<&()>, SOON).await.unwrap();
        assert_eq!((entry.size_bytes, entry.owner.as_str()), (3, "root"));
        let delete = |more: &str| format!("/files?path={}{more}", encode(&format!("{base}/x")));
        let body = full_body(Bytes::new());
        let refused = raw(&client, Method::DELETE, &delete(""), None, body).await;
        assert_eq!(code(refused), (409, "already_exists".into()));
        let body = full_body(Bytes::new());
        assert_eq!(
            raw(&client, Method::DELETE, &delete("&recursive=true"), None, body).await.0,
            204
        );
        assert!(!Path::new(&format!("{base}/x")).exists());
    });
}

#[test]
fn archives_agree_with_tar() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    let long = "a-long-name-".repeat(15);
    fs::create_dir_all(from.join("sub").join(&long)).unwrap();
    fs::write(from.join("sub").join(&long).join("file"), vec![b'x'; 200_001]).unwrap();
    fs::write(from.join("grüße"), "").unwrap();
    fs::write(from.join("script"), vec![1; 512]).unwrap();
    fs::set_permissions(from.join("script"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("script", from.join("link")).unwrap();
    symlink("/etc/passwd", from.join("outside")).unwrap();
    let base = dir.path().to_owned();
    with_agent(Path::new("/"), |client| async move {
        let uri = |name: &str| {
            let path = base.join(name);
            format!("/files?path={}", encode(path.to_str().unwrap()))
        };
        let none = full_body(Bytes::new());
        let (status, ours) = raw(&client, Method::GET, &uri("from"), Some(TAR), none).await;
        assert_eq!(status, 200);
        let same = |name: &str| {
            let status = Command::new("diff")
                .args(["-r", "--no-dereference"])
                .args([base.join("from"), base.join(name)])
                .status()
                .unwrap();
            assert!(status.success(), "{name} differs");
            let mode = fs::metadata(base.join(name).join("script")).unwrap().mode();
            assert_eq!(mode & 0o777, 0o755, "{name}");
        };
        // tar reads what the agent writes.
        fs::write(base.join("ours.tar"), &ours).unwrap();
        fs::create_dir(base.join("by-tar")).unwrap();
        let mut untar = Command::new("tar");
        untar.arg("-xf").arg(base.join("ours.tar")).arg("-C");
        assert!(untar.arg(base.join("by-tar")).status().unwrap().success());
        same("by-tar");
        // The agent reads that, and what tar writes in each of its formats.
        let (status, body) =
            raw(&client, Method::PUT, &uri("by-agent"), Some(TAR), full_body(ours)).await;
        assert_eq!(status, 200, "{body:?}");
        same("by-agent");
        for format in ["gnu", "pax"] {
            let file = base.join("theirs.tar");
            let mut tar = Command::new("tar");
            tar.arg(format!("--format={format}")).arg("-cf").arg(&file).arg("-C");
            assert!(tar.arg(base.join("from")).arg(".").status().unwrap().success());
            let bytes = fs::read(&file).unwrap();
            let name = format!("agent-{format}");
            let (status, body) =
                raw(&client, Method::PUT, &uri(&name), Some(TAR), full_body(bytes)).await;
            assert_eq!(status, 200, "{body:?}");
            same(&name);
        }
    });
}

#[test]
fn archives_cannot_get_out() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().to_owned();
    fs::create_dir(base.join("outside")).unwrap();
    fs::write(base.join("payload"), "evil").unwrap();
    let archive = |script: &str| {
        let file = base.join("evil.tar");
        let _ = fs::remove_file(&file);
        let script = script.replace("TAR", "tar --owner=0 --group=0 -P");
        let status = Command::new("sh").arg("-c").arg(script).current_dir(&base).status().unwrap();
        assert!(status.success());
        fs::read(file).unwrap()
    };
    let evil = [
        archive("TAR --transform 's,^,../outside/,' -cf evil.tar payload"),
        archive("TAR --transform 's,^,/tmp/,' -cf evil.tar payload"),
        // A link out first, then a file through it.
        archive(
            "ln -s ../outside way; TAR -cf evil.tar way; \
             TAR --transform 's,^,way/,' -rf evil.tar payload",
        ),
    ];
    with_agent(Path::new("/"), |client| async move {
        let target = base.join("target");
        let uri = format!("/files?path={}", encode(target.to_str().unwrap()));
        for (i, bytes) in evil.into_iter().enumerate() {
            let answer = raw(&client, Method::PUT, &uri, Some(TAR), full_body(bytes)).await;
            assert_eq!(code(answer), (400, "entry_escapes".into()), "archive {i}");
        }
        assert_eq!(fs::read_dir(base.join("outside")).unwrap().count(), 0);
        assert!(!Path::new("/tmp/payload").exists());
        for rubbish in [vec![b'x'; 2000], vec![b'x'; 10]] {
            let answer = raw(&client, Method::PUT, &uri, Some(TAR), full_body(rubbish)).await;
            assert_eq!(code(answer), (400, "invalid_request".into()));
        }
    });
}

#[test]
fn a_tunnel_is_a_connection() {
    with_agent(Path::new("/"), |client| async move {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut text = [0; 5];
            stream.read_exact(&mut text).await.unwrap();
            stream.write_all(b"got ").await.unwrap();
            stream.write_all(&text).await.unwrap();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await.unwrap();
            stream.write_all(&rest).await.unwrap();
        });
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<Bytes>(4);
        let stream = futures_util::stream::poll_fn(move |cx| {
            receiver.poll_recv(cx).map(|piece| piece.map(|p| Ok(Frame::data(p))))
        });
        let body: RequestBody = StreamBody::new(stream).boxed_unsync();
        let uri = format!("/tunnel?port={port}");
        let request = Request::builder().method(Method::POST).uri(uri).body(body).unwrap();
        let mut answer = client.send(request).await.unwrap().into_body();
        sender.send(Bytes::from_static(b"hello")).await.unwrap();
        let mut got = Vec::new();
        while got.len() < 9 {
            got.extend(answer.frame().await.unwrap().unwrap().into_data().unwrap());
        }
        assert_eq!(got, b"got hello");
        sender.send(Bytes::from_static(b"bye")).await.unwrap();
        drop(sender);
        assert_eq!(answer.collect().await.unwrap().to_bytes(), "bye");
        let none = full_body(Bytes::new());
        let closed = raw(&client, Method::POST, "/tunnel?port=1", None, none).await;
        assert_eq!(code(closed), (502, "port_not_open".into()));
        let none = full_body(Bytes::new());
        let bad = raw(&client, Method::POST, "/tunnel?port=0", None, none).await;
        assert_eq!(code(bad), (400, "invalid_request".into()));
    });
}
