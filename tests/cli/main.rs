//! The command line as a process: exit codes, what goes to which stream, what is asked of the
//! service. The service here is a stand-in; the real one is tested with real VMs elsewhere.

#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod stand_in;

use std::time::{Duration, Instant};

use serde_json::json;
use stand_in::{Answer, StandIn, rethaw};

const ID: &str = "abcdefghij0123456789";
const STARTED: &str = r#"{"type":"started","pid":7}"#;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn exit_frame(code: i32) -> String {
    json!({ "type": "exit", "code": code, "signal": null, "duration_ms": 1 }).to_string()
}

#[test]
fn exec_keeps_streams_and_exit_code_apart() {
    let service = StandIn::new(|_| {
        Answer::frames(&[
            STARTED,
            r#"{"type":"stdout","data":"out\n","encoding":"utf8"}"#,
            r#"{"type":"stderr","data":"/wAK","encoding":"base64"}"#,
            &exit_frame(3),
        ])
    });
    let done = service.rethaw(&["exec", ID, "-e", "A=1", "-w", "/tmp", "--", "sh", "-c", "x"]);
    assert_eq!(done.status.code(), Some(3));
    assert_eq!(done.stdout, b"out\n");
    assert_eq!(done.stderr, [0xff, 0, b'\n']);
    let asked = service.asked();
    assert_eq!(asked.len(), 1, "a whole id needs no look at the list");
    assert_eq!(asked[0].line, format!("POST /v1/sandboxes/{ID}/exec"));
    assert!(asked[0].head.contains("Bearer the-key"), "{}", asked[0].head);
    let wanted = json!({ "argv": ["sh", "-c", "x"], "env": { "A": "1" }, "cwd": "/tmp" });
    assert_eq!(asked[0].json(), wanted);
}

#[test]
fn exec_says_as_docker_does_when_nothing_ran() {
    for (error_code, wanted) in
        [("program_not_found", 127), ("program_not_executable", 126), ("cwd_not_found", 125)]
    {
        let service =
            StandIn::new(move |_| Answer::problem("422 Unprocessable", error_code, "the reason"));
        let done = service.rethaw(&["exec", ID, "nope"]);
        assert_eq!(done.status.code(), Some(wanted), "{error_code}");
        assert_eq!(text(&done.stderr), "rethaw: the reason\n");
    }
}

#[test]
fn exec_passes_a_pipe_on_and_leaves_a_device_alone() {
    let service = StandIn::new(|_| Answer::frames(&[STARTED, &exit_frame(0)]));
    assert!(service.rethaw_with(&["exec", ID, "cat"], Some(b"typed\n")).status.success());
    assert!(service.rethaw_with(&["exec", ID, "cat"], Some(&[0xff])).status.success());
    assert!(service.rethaw(&["exec", ID, "cat"]).status.success());
    assert!(service.rethaw_with(&["exec", "-n", ID, "cat"], Some(b"")).status.success());
    let bodies: Vec<_> = service.asked().iter().map(stand_in::Request::json).collect();
    assert_eq!(bodies[0]["stdin"], "typed\n");
    assert_eq!(bodies[1]["stdin_base64"], "/w==");
    for body in &bodies[2..] {
        assert_eq!(*body, json!({ "argv": ["cat"] }));
    }
}

#[test]
fn long_input_goes_through_a_file() {
    let service = StandIn::new(|request| match request.line.starts_with("PUT") {
        true => Answer::json("200 OK", &json!({})),
        false => Answer::frames(&[STARTED, &exit_frame(0)]),
    });
    let input: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
    assert!(service.rethaw_with(&["exec", ID, "wc", "-c"], Some(&input)).status.success());
    let asked = service.asked();
    assert!(asked[0].line.starts_with(&format!("PUT /v1/sandboxes/{ID}/files?path=/tmp/")));
    assert_eq!(asked[0].body, input);
    let argv = &asked[1].json()["argv"];
    let path = argv[3].as_str().unwrap();
    assert!(asked[0].line.ends_with(path), "{} {argv}", asked[0].line);
    assert_eq!((argv[4].as_str(), argv[5].as_str()), (Some("wc"), Some("-c")));
}

#[test]
fn an_output_that_breaks_off_is_no_success() {
    let cut = Answer { cut_off: true, ..Answer::frames(&[STARTED]) };
    let gone = Answer::frames(&[STARTED]);
    for answer in [cut, gone] {
        let service = StandIn::new(move |_| answer.clone());
        let done = service.rethaw(&["exec", ID, "x"]);
        assert_eq!(done.status.code(), Some(125));
        assert!(text(&done.stderr).starts_with("rethaw: "), "{}", text(&done.stderr));
    }
}

#[test]
fn run_removes_its_sandbox_whatever_happens() {
    for (frames, wanted) in [
        (vec![STARTED.to_owned(), exit_frame(4)], 4),
        (vec![STARTED.to_owned()], 125),
        (vec!["nonsense".to_owned()], 125),
    ] {
        let service = StandIn::new(move |request| match request.line.split(' ').next() {
            Some("DELETE") => Answer::empty(),
            _ if request.line.ends_with("/exec") => {
                Answer::frames(&frames.iter().map(String::as_str).collect::<Vec<_>>())
            }
            _ => Answer::json("201 Created", &json!({ "id": ID, "origin": "warm" })),
        });
        let done = service.rethaw(&["run", "-t", "py", "-e", "A=1", "--timeout", "2m", "ls"]);
        assert_eq!(done.status.code(), Some(wanted));
        let asked = service.asked();
        let created = asked[0].json();
        assert_eq!(created["template"], "py");
        assert_eq!(created["timeout_seconds"], 120);
        assert_eq!(created["env"], json!({ "A": "1" }));
        assert_eq!(asked.last().unwrap().line, format!("DELETE /v1/sandboxes/{ID}"));
    }
}

#[test]
fn a_stopped_run_leaves_no_sandbox() {
    let service = StandIn::new(|request| match request.line.split(' ').next() {
        Some("DELETE") => Answer::empty(),
        _ if request.line.ends_with("/exec") => Answer { hold: true, ..Answer::frames(&[STARTED]) },
        _ => Answer::json("201 Created", &json!({ "id": ID })),
    });
    let mut child = service
        .command(&["run", "sleep", "100"])
        .stdin(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while service.asked().len() < 2 {
        assert!(Instant::now() < deadline, "the command was never sent");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert_eq!(service.asked().last().unwrap().line, format!("DELETE /v1/sandboxes/{ID}"));
}

#[test]
fn short_ids_are_looked_up_over_all_pages() {
    let service = StandIn::new(|request| match request.line.as_str() {
        "GET /v1/sandboxes" => Answer::json(
            "200 OK",
            &json!({ "items": [{ "id": "zzz00000000000000000" }], "next_token": "a/b=" }),
        ),
        "GET /v1/sandboxes?next_token=a/b%3D" => {
            Answer::json("200 OK", &json!({ "items": [{ "id": ID }], "next_token": null }))
        }
        _ => Answer::empty(),
    });
    let done = service.rethaw(&["rm", "abc"]);
    assert_eq!((done.status.code(), text(&done.stdout)), (Some(0), format!("{ID}\n")));
    assert_eq!(service.asked().last().unwrap().line, format!("DELETE /v1/sandboxes/{ID}"));
    assert_eq!(service.rethaw(&["rm", "q"]).status.code(), Some(1));
    let all = service.rethaw(&["rm", "--all"]);
    assert_eq!(all.status.code(), Some(1));
    assert!(text(&all.stderr).contains("would remove 2 sandboxes; add --force"));
}

#[test]
fn cp_tells_files_from_folders() {
    let service = StandIn::new(|request| {
        let is_folder = request.line.ends_with("path=/folder");
        match request.line.split(' ').next() {
            Some("PUT") => Answer::json("200 OK", &json!({})),
            _ if !is_folder => Answer::bytes("application/octet-stream", b"contents"),
            _ if request.head.contains("x-tar") => {
                let mut archive = tar::Builder::new(Vec::new());
                let mut header = tar::Header::new_gnu();
                header.set_size(1);
                header.set_mode(0o644);
                archive.append_data(&mut header, "inner", &b"x"[..]).unwrap();
                Answer::bytes("application/x-tar", &archive.into_inner().unwrap())
            }
            _ => Answer::problem("409 Conflict", "is_a_directory", "a folder"),
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let local = dir.path().to_str().unwrap();
    assert!(service.rethaw(&["cp", &format!("{ID}:/file"), local]).status.success());
    assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), b"contents");
    assert!(service.rethaw(&["cp", &format!("{ID}:/folder"), local]).status.success());
    assert_eq!(std::fs::read(dir.path().join("folder/inner")).unwrap(), b"x");
    let contents = dir.path().join("contents");
    let done = service.rethaw(&["cp", &format!("{ID}:/folder/."), contents.to_str().unwrap()]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(contents.join("inner").exists());
    assert_eq!(service.rethaw(&["cp", &format!("{ID}:/file"), "-"]).stdout, b"contents");

    let file = dir.path().join("file");
    let done = service.rethaw(&["cp", file.to_str().unwrap(), &format!("{ID}:/folder")]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let put = service.asked().pop().unwrap();
    assert!(put.line.starts_with(&format!("PUT /v1/sandboxes/{ID}/files?path=/folder/file&mode=")));
    assert_eq!(put.body, b"contents");
}

#[test]
fn a_service_that_is_not_there_is_told_how_to_start() {
    // Bound and let go: nobody listens there.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}");
    for (command, code) in [(&["ls"][..], 1), (&["exec", ID, "x"], 125), (&["run", "x"], 125)] {
        let done = rethaw(command).env("RETHAW_URL", &url).output().unwrap();
        assert_eq!(done.status.code(), Some(code), "{command:?}");
        assert!(text(&done.stderr).contains("start the service with `rethaw serve`"));
        assert!(done.stdout.is_empty());
    }
}

#[test]
fn what_is_no_rethaw_is_noticed() {
    let service = StandIn::new(|_| Answer::bytes("text/html", b"<html>hello</html>"));
    let done = service.rethaw(&["ls"]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("is it the right URL?"), "{}", text(&done.stderr));
}

#[test]
fn serve_refuses_to_be_open_to_everybody() {
    let args = ["serve", "--insecure-no-auth", "--listen", "0.0.0.0:0"];
    let done = rethaw(&args).output().unwrap();
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("anybody on that network"), "{}", text(&done.stderr));
}

#[test]
fn completions_know_the_subcommands() {
    for shell in ["bash", "zsh", "fish"] {
        let done = rethaw(&["completions", shell]).output().unwrap();
        assert!(done.status.success());
        for word in ["template", "insecure-no-auth", "detach"] {
            assert!(text(&done.stdout).contains(word), "{shell}: {word}");
        }
    }
}

#[test]
fn a_build_uploads_what_it_copies_and_shows_what_it_says() {
    let states = std::sync::atomic::AtomicU32::new(0);
    let service = StandIn::new(move |request| {
        let line = request.line.as_str();
        let of = |state: &str| json!({ "name": "app", "state": state });
        if line.starts_with("GET /v1/inputs/") {
            return Answer::problem("404 Not Found", "input_not_found", "no input");
        }
        if line.starts_with("PUT /v1/inputs/") {
            return Answer::json("201 Created", &json!({}));
        }
        if line.ends_with("/log?follow=true") {
            return Answer::frames(&[
                r#"{"time":"x","kind":"step","step":1,"text":"copy /srv"}"#,
                r#"{"time":"x","kind":"stdout","step":2,"text":"no line end"}"#,
                r#"{"time":"x","kind":"news","text":"of a later version"}"#,
                r#"{"time":"x","kind":"end","text":"failed"}"#,
            ]);
        }
        if line.starts_with("POST") {
            return Answer::json("202 Accepted", &of("queued"));
        }
        let first = states.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0;
        let mut template = of(if first { "failed" } else { "ready" });
        template["error"] = json!("step 2 (run x): ended with exit code 1");
        Answer::json("200 OK", &template)
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "text").unwrap();
    let copy = format!("{}:/srv", dir.path().display());
    let args = ["template", "build", "app", "--copy", &copy, "--run", "x", "--wait-port", "80"];
    let done = service.rethaw(&args);
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    let wanted = "rethaw: copy /srv\nno line end\nrethaw: of a later version\n\
                  rethaw: template app failed: step 2 (run x): ended with exit code 1\n";
    assert_eq!(said, wanted);
    let asked = service.asked();
    let lines: Vec<_> = asked.iter().map(|r| r.line.clone()).collect();
    let digest = lines[1].strip_prefix("PUT /v1/inputs/").unwrap().to_owned();
    assert_eq!(lines[0], format!("GET /v1/inputs/{digest}"));
    let steps = json!([
        { "copy": { "dst": "/srv", "archive_sha256": digest } },
        { "run": "x" },
        { "wait": { "port": 80 } },
    ]);
    assert_eq!(asked[2].json(), json!({ "name": "app", "from": "base", "steps": steps }));
    assert_eq!(lines[3..], ["GET /v1/templates/app/log?follow=true", "GET /v1/templates/app"]);

    let done = service.rethaw(&["template", "build", "app"]);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
    assert_eq!(text(&done.stdout), "template app is ready\n");
}
