//! Commands through a real agent and client, in one process.
#![cfg(feature = "client")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{SOON, with_agent};
use guest_agent::client::{AgentClient, AgentError, ExecStream};
use guest_agent::wire::{
    Base64, ExecExit, ExecFrame, ExecInput, ExecRequest, ProcessList, PtySize, SignalRequest,
    StdinRequest,
};
use hyper::http::Method;
use std::path::Path;
use std::time::{Duration, Instant};

fn sh(script: &str) -> ExecRequest {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    ExecRequest { argv, cwd: Some("/".to_owned()), ..Default::default() }
}

/// Reads to the end: standard output, standard error, exit.
async fn finish(mut stream: ExecStream) -> (Vec<u8>, Vec<u8>, ExecExit) {
    let (mut out, mut err, mut started) = (Vec::new(), Vec::new(), false);
    loop {
        match stream.next_frame().await.unwrap().expect("frames end with a terminal one") {
            ExecFrame::Started(_) => {
                assert!(!started && out.is_empty() && err.is_empty());
                started = true;
            }
            ExecFrame::Stdout(chunk) => out.extend(chunk.into_bytes().unwrap()),
            ExecFrame::Stderr(chunk) => err.extend(chunk.into_bytes().unwrap()),
            ExecFrame::Keepalive(_) => {}
            ExecFrame::Exit(exit) => {
                assert!(started);
                assert!(stream.next_frame().await.unwrap().is_none(), "one terminal frame");
                return (out, err, exit);
            }
            ExecFrame::Error(error) => panic!("{error:?}"),
        }
    }
}

async fn run(client: &AgentClient, request: &ExecRequest) -> (String, String, ExecExit) {
    let (out, err, exit) = finish(client.exec(request, SOON).await.unwrap()).await;
    (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), exit)
}

async fn refused(client: &AgentClient, request: &ExecRequest) -> (u16, String) {
    match client.exec(request, SOON).await {
        Err(AgentError::Refused { status, error_code, .. }) => (status, error_code),
        other => panic!("not refused: {other:?}"),
    }
}

fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

async fn until_dead(pid: u32) {
    let since = Instant::now();
    while alive(pid) {
        assert!(since.elapsed() < SOON, "process {pid} still lives");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn output_and_exit_code_come_back() {
    with_agent(Path::new("/"), |client| async move {
        let (out, err, exit) = run(&client, &sh("echo out; echo err >&2; exit 7")).await;
        assert_eq!((out.as_str(), err.as_str(), exit.code), ("out\n", "err\n", 7));
        assert_eq!((exit.signal, exit.timed_out), (None, false));
        let (_, _, exit) = run(&client, &sh("kill -TERM $$")).await;
        assert_eq!((exit.code, exit.signal.as_deref()), (143, Some("SIGTERM")));
    });
}

#[test]
fn environment_directory_and_user() {
    with_agent(Path::new("/"), |client| async move {
        let mut request = sh("echo $A-$HOME-$USER; pwd; id -u; id -G");
        request.env.insert("A".into(), "b c".into());
        request.cwd = Some("/usr/bin".into());
        let (out, _, _) = run(&client, &request).await;
        assert_eq!(out, "b c-/root-root\n/usr/bin\n0\n0\n");
        let mut request = sh("id -un; pwd; cat /proc/self/status | grep Groups");
        request.user = Some("daemon".into());
        request.cwd = None;
        let (out, err, exit) = run(&client, &request).await;
        assert!(out.starts_with("daemon\n/usr/sbin\nGroups:\t1"), "{out} {err} {exit:?}");
    });
}

#[test]
fn every_refusal_has_its_code() {
    with_agent(Path::new("/"), |client| async move {
        let argv =
            |program: &str| ExecRequest { argv: vec![program.to_owned()], ..Default::default() };
        let not_found = (422, "program_not_found".to_owned());
        assert_eq!(refused(&client, &argv("no-such-program")).await, not_found);
        assert_eq!(refused(&client, &argv("/bin/no-such")).await, not_found);
        let not_executable = (422, "program_not_executable".to_owned());
        assert_eq!(refused(&client, &argv("/etc/passwd")).await, not_executable);
        assert_eq!(refused(&client, &argv("/etc")).await, not_executable);
        assert_eq!(refused(&client, &argv("")).await, (422, "invalid_command".to_owned()));
        let none = ExecRequest::default();
        assert_eq!(refused(&client, &none).await, (422, "invalid_command".to_owned()));
        let cwd = ExecRequest { cwd: Some("/no/such".into()), ..sh("true") };
        assert_eq!(refused(&client, &cwd).await, (422, "cwd_not_found".to_owned()));
        let user = ExecRequest { user: Some("no-such-user".into()), ..sh("true") };
        assert_eq!(refused(&client, &user).await, (422, "user_not_found".to_owned()));
        let timeout = ExecRequest { timeout_seconds: Some(-1.0), ..sh("true") };
        assert_eq!(refused(&client, &timeout).await, (422, "invalid_command".to_owned()));
        let mut env = sh("true");
        env.env.insert("A=B".into(), String::new());
        assert_eq!(refused(&client, &env).await, (422, "invalid_command".to_owned()));
        let nul = ExecRequest { argv: vec!["echo".into(), "a\0b".into()], ..Default::default() };
        assert_eq!(refused(&client, &nul).await, (422, "invalid_command".to_owned()));
    });
}

#[test]
fn standard_input_whole_streamed_and_none() {
    with_agent(Path::new("/"), |client| async move {
        let text = "x".repeat(300_000);
        let whole = ExecRequest { stdin: Some(text.clone()), ..sh("wc -c") };
        assert_eq!(run(&client, &whole).await.0.trim(), "300000");
        assert_eq!(run(&client, &sh("cat; echo end")).await.0, "end\n");

        let request = ExecRequest { stdin_stream: true, ..sh("cat") };
        let stream = client.exec(&request, SOON).await.unwrap();
        let sender = stream.sender();
        let reader = tokio::task::spawn_local(finish(stream));
        for i in 0..200u8 {
            sender.send(&ExecInput::Stdin(Base64(vec![i; 4096]))).await.unwrap();
        }
        sender.send(&ExecInput::Eof(true)).await.unwrap();
        let (out, _, exit) = reader.await.unwrap();
        assert_eq!((out.len(), exit.code), (200 * 4096, 0));
        assert!(out.chunks(4096).enumerate().all(|(i, c)| c.iter().all(|b| *b == i as u8)));
    });
}

#[test]
fn binary_output_survives() {
    with_agent(Path::new("/"), |client| async move {
        let request = sh("head -c 3000000 /dev/zero | tr '\\0' '\\377'");
        let (out, _, _) = finish(client.exec(&request, SOON).await.unwrap()).await;
        assert_eq!(out.len(), 3_000_000);
        assert!(out.iter().all(|b| *b == 0xff));
    });
}

#[test]
fn time_limit_kills_the_whole_group() {
    with_agent(Path::new("/"), |client| async move {
        let mut request = sh("sleep 100 & echo $!; wait");
        request.timeout_seconds = Some(0.2);
        let (out, _, exit) = run(&client, &request).await;
        assert!(exit.timed_out);
        assert_eq!((exit.code, exit.signal.as_deref()), (137, Some("SIGKILL")));
        until_dead(out.trim().parse().unwrap()).await;
    });
}

#[test]
fn a_client_that_leaves_ends_its_command() {
    with_agent(Path::new("/"), |client| async move {
        let mut stream = client.exec(&sh("sleep 100"), SOON).await.unwrap();
        let Some(ExecFrame::Started(started)) = stream.next_frame().await.unwrap() else {
            panic!("no start");
        };
        assert!(alive(started.pid));
        drop(stream);
        until_dead(started.pid).await;

        let request = ExecRequest { background: true, ..sh("sleep 0.3; exit 3") };
        let mut stream = client.exec(&request, SOON).await.unwrap();
        let Some(ExecFrame::Started(started)) = stream.next_frame().await.unwrap() else {
            panic!("no start");
        };
        drop(stream);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(alive(started.pid), "a background command outlives its request");
        until_dead(started.pid).await;
    });
}

#[test]
fn a_slow_reader_holds_the_command_up_not_the_agent() {
    with_agent(Path::new("/"), |client| async move {
        let mut slow = client.exec(&sh("yes | head -c 8000000"), SOON).await.unwrap();
        slow.next_frame().await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (out, _, _) = run(&client, &sh("echo quick")).await;
        assert_eq!(out, "quick\n");
        let (out, _, exit) = {
            let mut total = 0;
            let exit = loop {
                match slow.next_frame().await.unwrap().unwrap() {
                    ExecFrame::Stdout(chunk) => total += chunk.into_bytes().unwrap().len(),
                    ExecFrame::Exit(exit) => break exit,
                    _ => {}
                }
            };
            (total, (), exit)
        };
        assert_eq!((out, exit.code), (8_000_000, 0));
    });
}

#[test]
fn terminals() {
    with_agent(Path::new("/"), |client| async move {
        let mut request = sh("tty >/dev/null && stty size; read line; echo got $line; stty size");
        request.pty = Some(PtySize { cols: 90, rows: 33 });
        request.stdin_stream = true;
        let stream = client.exec(&request, SOON).await.unwrap();
        let sender = stream.sender();
        sender.send(&ExecInput::Resize(PtySize { cols: 100, rows: 40 })).await.unwrap();
        sender.send(&ExecInput::Stdin(Base64(b"hello\n".to_vec()))).await.unwrap();
        let (out, _, exit) = finish(stream).await;
        let out = String::from_utf8(out).unwrap();
        assert!(out.contains("got hello") && out.contains("40 100"), "{out:?}");
        assert_eq!(exit.code, 0);
    });
}

#[test]
fn signals_reach_the_group() {
    with_agent(Path::new("/"), |client| async move {
        let request = ExecRequest {
            stdin_stream: true,
            ..sh("trap 'echo caught; exit 5' USR1; echo up; while :; do sleep 0.01; done")
        };
        let mut stream = client.exec(&request, SOON).await.unwrap();
        let sender = stream.sender();
        loop {
            if matches!(stream.next_frame().await.unwrap(), Some(ExecFrame::Stdout(_))) {
                break;
            }
        }
        sender.send(&ExecInput::Signal("SIGUSR1".into())).await.unwrap();
        let mut text = String::new();
        let exit = loop {
            match stream.next_frame().await.unwrap().unwrap() {
                ExecFrame::Stdout(chunk) => text.push_str(&chunk.data),
                ExecFrame::Exit(exit) => break exit,
                _ => {}
            }
        };
        assert_eq!(exit.code, 5, "{text:?} {exit:?}");
    });
}

#[test]
fn no_process_is_left_unreaped() {
    with_agent(Path::new("/"), |client| async move {
        for _ in 0..50 {
            assert_eq!(run(&client, &sh("true")).await.2.code, 0);
            let missing = ExecRequest { argv: vec!["no-such".into()], ..Default::default() };
            refused(&client, &missing).await;
        }
        let health = client.health(SOON).await.unwrap();
        assert_eq!(health.processes, 0);
    });
}

#[test]
fn commands_are_found_fed_and_joined_later() {
    with_agent(Path::new("/"), |client| async move {
        let request = ExecRequest {
            background: true,
            stdin_open: true,
            tag: Some("echoer".into()),
            ..sh("while read line; do echo got $line; done; echo end")
        };
        let mut first = client.exec(&request, SOON).await.unwrap();
        let Some(ExecFrame::Started(started)) = first.next_frame().await.unwrap() else {
            panic!("no start");
        };
        drop(first);
        let list: ProcessList =
            client.call(Method::GET, "/processes", None::<&()>, SOON).await.unwrap();
        assert_eq!(list.items.len(), 1);
        assert_eq!(
            (list.items[0].pid, list.items[0].tag.as_deref()),
            (started.pid, Some("echoer"))
        );
        let at = |action: &str| format!("/processes/{}/{action}", started.pid);
        let stdin = |text: &str| StdinRequest { stdin: Base64(text.as_bytes().to_vec()) };
        let body = stdin("one\n");
        client.call::<_, ()>(Method::POST, &at("stdin"), Some(&body), SOON).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;

        // Joining later shows what was missed.
        let joined = client.attach(started.pid, true, SOON).await.unwrap();
        let body = stdin("two\n");
        client.call::<_, ()>(Method::POST, &at("stdin"), Some(&body), SOON).await.unwrap();
        client.call::<_, ()>(Method::POST, &at("stdin/close"), None::<&()>, SOON).await.unwrap();
        let (out, _, exit) = finish(joined).await;
        assert_eq!((out.as_slice(), exit.code), (&b"got one\ngot two\nend\n"[..], 0));

        let gone = client.attach(started.pid, true, SOON).await;
        assert!(format!("{gone:?}").contains("process_not_found"), "{gone:?}");
        let nothing = client.call::<_, ()>(Method::POST, "/processes/x/y", None::<&()>, SOON).await;
        assert!(format!("{nothing:?}").contains("not_found"), "{nothing:?}");
    });
}

#[test]
fn signals_and_sizes_from_outside() {
    with_agent(Path::new("/"), |client| async move {
        let request = ExecRequest { background: true, ..sh("sleep 100") };
        let mut stream = client.exec(&request, SOON).await.unwrap();
        let Some(ExecFrame::Started(started)) = stream.next_frame().await.unwrap() else {
            panic!("no start");
        };
        let at = |action: &str| format!("/processes/{}/{action}", started.pid);
        let size = PtySize { cols: 1, rows: 1 };
        let no_terminal =
            client.call::<_, ()>(Method::POST, &at("resize"), Some(&size), SOON).await;
        assert!(format!("{no_terminal:?}").contains("wrong_state"), "{no_terminal:?}");
        let unknown = SignalRequest { signal: "SIGNOPE".into() };
        let unknown = client.call::<_, ()>(Method::POST, &at("signal"), Some(&unknown), SOON).await;
        assert!(format!("{unknown:?}").contains("invalid_command"), "{unknown:?}");
        let signal = SignalRequest { signal: "SIGTERM".into() };
        client.call::<_, ()>(Method::POST, &at("signal"), Some(&signal), SOON).await.unwrap();
        let exit = loop {
            if let Some(ExecFrame::Exit(exit)) = stream.next_frame().await.unwrap() {
                break exit;
            }
        };
        assert_eq!((exit.code, exit.signal.as_deref()), (143, Some("SIGTERM")));
    });
}
