//! Other ways in than plain TCP: TLS, a Unix socket, and a terminal.

use std::io::{Read, Write};
use std::process::Command;

use serde_json::json;

use crate::client::within;
use crate::service::{Service, id, rethaw};

const CONFIG: &str = "
[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = rethaw test
[extensions]
basicConstraints = critical,CA:FALSE
subjectAltName = IP:127.0.0.1
";

/// A certificate for 127.0.0.1 that vouches for itself.
fn certificate(dir: &std::path::Path) -> String {
    let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    let config = dir.join("openssl.cnf");
    std::fs::write(&config, CONFIG).unwrap();
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
        .args(["-nodes", "-days", "2"])
        .arg("-config")
        .arg(&config)
        .arg("-out")
        .arg(&cert)
        .arg("-keyout")
        .arg(&key)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    cert.display().to_string()
}

#[tokio::test]
async fn the_command_line_comes_in_through_tls_and_a_socket() {
    let keys = tempfile::tempdir().unwrap();
    let cert = certificate(keys.path());
    let key = keys.path().join("key.pem").display().to_string();
    let socket = keys.path().join("r.sock").display().to_string();
    let flags = ["--unix-socket", &socket, "--tls-cert", &cert, "--tls-key", &key];
    let service = Service::start_by_socket(&flags, &socket).await;
    let run = |url: String, trust: Option<String>, args: Vec<String>| {
        let mut command = rethaw();
        command.env("RETHAW_URL", url).env("RETHAW_HOME", service.home().path());
        command.env_remove("SSL_CERT_FILE").env_remove("SSL_CERT_DIR");
        command.envs(trust.map(|file| ("SSL_CERT_FILE", file)));
        command.args(args);
        async move {
            let run = tokio::task::spawn_blocking(move || command.output().unwrap());
            within("the command line", run).await.unwrap()
        }
    };
    let args = |args: &[&str]| args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
    let url = service.listening_on("https://");
    let done =
        run(url.clone(), Some(cert.clone()), args(&["run", "--", "echo", "through tls"])).await;
    assert_eq!(String::from_utf8_lossy(&done.stdout), "through tls\n", "{done:?}");
    // Somebody whom nobody vouches for is not talked to.
    let stranger = keys.path().join("stranger");
    std::fs::create_dir(&stranger).unwrap();
    let other = certificate(&stranger);
    let done = run(url.clone(), Some(other), args(&["ls"])).await;
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    assert!(String::from_utf8_lossy(&done.stderr).contains("certificate"), "{done:?}");
    let plain = run(url.replace("https", "http"), None, args(&["ls"])).await;
    assert_eq!(plain.status.code(), Some(1), "{plain:?}");
    let done = run(format!("unix:{socket}"), None, args(&["ls", "--json"])).await;
    assert!(done.status.success(), "{done:?}");
    service.stop().await;
    assert!(!std::path::Path::new(&socket).exists(), "the socket is still there");
}

#[tokio::test]
async fn a_shell_is_a_terminal_with_a_size_and_an_exit_code() {
    let service = Service::start(1).await;
    let made = id(&service.create_with(&json!({ "timeout_seconds": 3600 })).await);
    let pty = nix::pty::openpty(
        Some(&nix::pty::Winsize { ws_row: 33, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 }),
        None,
    )
    .unwrap();
    let mut command = rethaw();
    let terminal = || std::process::Stdio::from(pty.slave.try_clone().unwrap());
    command
        .env("RETHAW_URL", service.client().url())
        .env("RETHAW_HOME", service.home().path())
        .env("TERM", "vt100")
        .args(["shell", &made])
        .stdin(terminal())
        .stdout(terminal())
        .stderr(terminal());
    let mut shell = command.spawn().unwrap();
    drop(command);
    drop(pty.slave);
    let mut master = std::fs::File::from(pty.master);
    let talk = tokio::task::spawn_blocking(move || {
        // What is typed before the shell is there waits in the terminal.
        master.write_all(b"stty size; echo $TERM; tty; whoami; exit 42\n").unwrap();
        let (mut said, mut buffer) = (Vec::new(), [0_u8; 4096]);
        // The end of a terminal is an error.
        while let Ok(n @ 1..) = master.read(&mut buffer) {
            said.extend_from_slice(&buffer[..n]);
        }
        (shell.wait().unwrap(), String::from_utf8_lossy(&said).into_owned())
    });
    let (status, said) = within("the shell", talk).await.unwrap();
    assert_eq!(status.code(), Some(42), "{said}");
    for wanted in ["33 101", "vt100", "/dev/pts/", "root"] {
        assert!(said.contains(wanted), "no {wanted:?} in {said:?}");
    }
    let path = format!("/v1/sandboxes/{made}/pty");
    service.client().get(&path).await.refused(426, "websocket_needed");
    service.client().get(&format!("{path}?cols=0")).await.refused(422, "invalid_field");
    service.stop().await;
}
