//! A world for one test: network namespaces that stand in for the host and for what is outside.
//!
//! ```text
//! service and test: h0 198.51.100.1, fd00:51::1 --- o0 198.51.100.2 and .3, fd00:51::2: servers
//!                                                      169.254.169.254: what no sandbox may reach
//! ```
//!
//! The test's thread, and so every socket and process it makes, is in the first namespace. Nothing
//! of the machine's own network is touched.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use nix::sched::{CloneFlags, unshare};

/// Answers with who asked; `GET /big` with many bytes.
pub const HTTP: u16 = 8000;
/// Says back every line.
pub const ECHO: u16 = 8001;
/// Keeps what it hears.
pub const UDP: u16 = 8002;
/// Bytes of `/big`.
pub const BIG: usize = 4 << 20;

/// Datagrams, and who sent them.
type Heard = Arc<Mutex<Vec<(IpAddr, Vec<u8>)>>>;
/// Names that were asked for over TCP.
type Asked = Arc<Mutex<Vec<String>>>;

/// The world as the test sees it.
#[derive(Debug, Clone)]
pub struct World {
    heard: Heard,
    asked: Asked,
}

impl World {
    /// What the server outside has heard.
    pub fn heard(&self) -> Vec<(IpAddr, String)> {
        let heard = self.heard.lock().unwrap();
        heard.iter().map(|(from, b)| (*from, String::from_utf8_lossy(b).into_owned())).collect()
    }

    /// How often the name server outside was asked for this name over TCP.
    pub fn asked_over_tcp(&self, name: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| *asked == name).count()
    }
}

/// Runs a test in a world of its own.
pub fn in_world<F: AsyncFnOnce(World) + Send + 'static>(test: F) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let world = World { heard: Heard::default(), asked: Asked::default() };
        let (said, outside) = mpsc::channel();
        let (connected, connect) = mpsc::channel();
        let (heard, asked) = (Arc::clone(&world.heard), Arc::clone(&world.asked));
        let servers = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            said.send(nix::unistd::gettid().as_raw()).unwrap();
            connect.recv().unwrap();
            ip("link set lo up");
            ip("link set o0 up");
            for address in ["198.51.100.2/24", "198.51.100.3/32", "169.254.169.254/32"] {
                ip(&format!("address add {address} dev o0"));
            }
            ip("address add fd00:51::2/64 dev o0 nodad");
            serve(&heard, &asked);
        });
        let namespace =
            format!("/proc/{}/task/{}/ns/net", std::process::id(), outside.recv().unwrap());
        ip("link set lo up");
        ip("link add h0 type veth peer name o0");
        ip(&format!("link set o0 netns {namespace}"));
        ip("link set h0 up");
        ip("address add 198.51.100.1/24 dev h0");
        ip("address add fd00:51::1/64 dev h0 nodad");
        ip("route add default via 198.51.100.2");
        ip("route add default via fd00:51::2");
        connected.send(()).unwrap();
        servers.join().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(world));
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

/// What a command of this namespace prints.
pub fn shown(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Starts the servers; their threads end with the test's process.
fn serve(heard: &Heard, asked: &Asked) {
    let http = TcpListener::bind(("::", HTTP)).unwrap();
    std::thread::spawn(move || http.incoming().flatten().for_each(|s| each(s, answer)));
    let echo = TcpListener::bind(("::", ECHO)).unwrap();
    std::thread::spawn(move || echo.incoming().flatten().for_each(|s| each(s, say_back)));
    let udp = UdpSocket::bind(("::", UDP)).unwrap();
    let heard = Arc::clone(heard);
    std::thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((n, from)) = udp.recv_from(&mut bytes) {
            heard.lock().unwrap().push((from.ip().to_canonical(), bytes[..n].to_vec()));
            let _ = udp.send_to(&bytes[..n], from);
        }
    });
    let names = UdpSocket::bind(("198.51.100.2", 53)).unwrap();
    std::thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((n, from)) = names.recv_from(&mut bytes) {
            let _ = names.send_to(&resolve(&bytes[..n], false), from);
        }
    });
    let names = TcpListener::bind(("198.51.100.2", 53)).unwrap();
    let asked = Arc::clone(asked);
    std::thread::spawn(move || {
        for mut stream in names.incoming().flatten() {
            let asked = Arc::clone(&asked);
            std::thread::spawn(move || resolve_over_tcp(&mut stream, &asked));
        }
    });
}

fn each(stream: TcpStream, serve: fn(TcpStream) -> std::io::Result<()>) {
    std::thread::spawn(move || {
        let _ = serve(stream);
    });
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let peer = stream.peer_addr()?.ip().to_canonical();
    let mut request = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    request.read_line(&mut first)?;
    let mut line = String::new();
    while request.read_line(&mut line)? > 2 {
        line.clear();
    }
    let body = if first.starts_with("GET /big") {
        vec![b'x'; BIG]
    } else {
        format!("hello {peer}").into_bytes()
    };
    let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body)
}

fn say_back(mut stream: TcpStream) -> std::io::Result<()> {
    let mut bytes = [0; 1024];
    loop {
        let n = stream.read(&mut bytes)?;
        if n == 0 {
            return Ok(());
        }
        stream.write_all(&bytes[..n])?;
    }
}

/// Where the name in a question ends.
fn name_end(question: &[u8]) -> usize {
    12 + question[12..].iter().position(|b| *b == 0).unwrap() + 1
}

/// Messages with their length before them, until the other side has no more.
fn resolve_over_tcp(stream: &mut TcpStream, asked: &Asked) -> std::io::Result<()> {
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut question = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut question)?;
        let mut labels = &question[12..name_end(&question) - 1];
        let mut name = Vec::new();
        while let [length, rest @ ..] = labels {
            let (label, rest) = rest.split_at(usize::from(*length));
            name.push(String::from_utf8_lossy(label).into_owned());
            labels = rest;
        }
        asked.lock().unwrap().push(name.join("."));
        let reply = resolve(&question, true);
        stream.write_all(&[&(reply.len() as u16).to_be_bytes()[..], &reply].concat())?;
    }
}

/// A name server: `allowed.test` and `long.test` are `.3`, everything else `.2`; IPv4 only. What
/// `long.test` is, it says over TCP only.
fn resolve(question: &[u8], tcp: bool) -> Vec<u8> {
    let name_end = name_end(question);
    let kind = &question[name_end..name_end + 2];
    let long = question[12..].starts_with(b"\x04long");
    let last = if long || question[12..].starts_with(b"\x07allowed") { 3 } else { 2 };
    let mut reply = question[..name_end + 4].to_vec();
    let cut_short = long && !tcp;
    let answers = u8::from(kind == [0, 1] && !cut_short);
    let flags = 0x81 | u8::from(cut_short) << 1;
    reply[2..12].copy_from_slice(&[flags, 0x80, 0, 1, 0, answers, 0, 0, 0, 0]);
    if answers == 1 {
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 198, 51, 100, last]);
    }
    reply
}
