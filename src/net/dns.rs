//! A slot's name server: passes on what its sandbox may ask, and opens the way to what it is told.
//!
//! It listens on the gateway's address in the slot's namespace, so who asks is known from the socket,
//! and asks the host's own name servers from the service's namespace. For a sandbox that may reach
//! named destinations only, other names are refused: a question is a message to whoever answers it.
//! The addresses of an allowed name are in the rules before the guest has the answer.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use simple_dns::rdata::RData;
use simple_dns::{Packet, RCODE};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::policy::Internet;
use super::slot::{NameSockets, Shared};

const PORT: u16 = 53;
/// Longest message of UDP.
const MAX_UDP: usize = 4096;
/// How long one name server may take before the next is asked.
const ANSWER: Duration = Duration::from_secs(2);
/// Questions of one guest under way at once; those beyond are lost, as on any busy network.
const AT_ONCE: usize = 64;
/// How long a guest's TCP connection may say nothing.
const IDLE: Duration = Duration::from_secs(10);
/// An address is good for at least this long after its answer, and at most.
const LEAST: Duration = Duration::from_secs(60);
const MOST: Duration = Duration::from_secs(24 * 3600);
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Who is asked.
#[derive(Debug)]
pub struct Resolver {
    named: Vec<IpAddr>,
}

impl Resolver {
    /// These name servers, or the host's when there are none.
    pub fn new(named: Vec<IpAddr>) -> Self {
        Self { named }
    }

    /// Read anew each time: a host's name servers change with its network.
    fn servers(&self) -> Vec<SocketAddr> {
        let servers = if self.named.is_empty() {
            host_servers(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default())
        } else {
            self.named.clone()
        };
        servers.into_iter().map(|server| SocketAddr::new(server, PORT)).collect()
    }

    async fn ask_udp(&self, question: &[u8]) -> io::Result<Vec<u8>> {
        let mut last: io::Error = io::ErrorKind::NotFound.into();
        for server in self.servers() {
            match tokio::time::timeout(ANSWER, ask_one(server, question)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(e)) => last = e,
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(last)
    }

    async fn ask_tcp(&self, question: &[u8]) -> io::Result<Vec<u8>> {
        let mut last: io::Error = io::ErrorKind::NotFound.into();
        for server in self.servers() {
            let ask = async {
                let mut stream = TcpStream::connect(server).await?;
                write_message(&mut stream, question).await?;
                read_message(&mut stream).await
            };
            match tokio::time::timeout(ANSWER, ask).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(e)) => last = e,
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(last)
    }
}

async fn ask_one(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // A port of its own for each question: whoever would forge an answer has to guess it.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; MAX_UDP];
    loop {
        let n = socket.recv(&mut answer).await?;
        if n >= 12 && answer.get(..2) == question.get(..2) {
            answer.truncate(n);
            return Ok(answer);
        }
    }
}

fn host_servers(resolv_conf: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        // An IPv6 address may name its link; those of one link are not for us to know.
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    };
    resolv_conf.lines().filter_map(server).collect()
}

/// Starts the name server of a slot; it ends with its tasks.
pub(super) fn serve(
    sockets: NameSockets,
    shared: &Arc<Shared>,
    resolver: &Arc<Resolver>,
) -> io::Result<Vec<JoinHandle<()>>> {
    let udp = Arc::new(UdpSocket::from_std(sockets.udp)?);
    let tcp = TcpListener::from_std(sockets.tcp)?;
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let guest = Guest { shared: Arc::clone(shared), resolver: Arc::clone(resolver), room };
    let short = tokio::spawn(guest.clone().serve_udp(udp));
    let long = tokio::spawn(guest.serve_tcp(tcp));
    Ok(vec![short, long])
}

#[derive(Debug, Clone)]
struct Guest {
    shared: Arc<Shared>,
    resolver: Arc<Resolver>,
    room: Arc<Semaphore>,
}

impl Guest {
    async fn serve_udp(self, socket: Arc<UdpSocket>) {
        // Answers under way end with this task.
        let mut answers = tokio::task::JoinSet::new();
        let mut question = vec![0; MAX_UDP];
        loop {
            let (n, from) = tokio::select! {
                received = socket.recv_from(&mut question) => match received {
                    Ok(received) => received,
                    // An answer that did not arrive is reported here; the socket is as good.
                    Err(_) => continue,
                },
                Some(_) = answers.join_next(), if !answers.is_empty() => continue,
            };
            let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else { continue };
            let (guest, socket) = (self.clone(), Arc::clone(&socket));
            let question = question[..n].to_vec();
            answers.spawn(async move {
                if let Some(answer) = guest.answer(&question, false).await {
                    let _ = socket.send_to(&answer, from).await;
                }
                drop(room);
            });
        }
    }

    async fn serve_tcp(self, listener: TcpListener) {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let stream = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(_) => continue,
                },
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            };
            let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else { continue };
            let guest = self.clone();
            connections.spawn(async move {
                guest.converse(stream).await;
                drop(room);
            });
        }
    }

    async fn converse(&self, mut stream: TcpStream) {
        while let Ok(Ok(question)) = tokio::time::timeout(IDLE, read_message(&mut stream)).await {
            let Some(answer) = self.answer(&question, true).await else { return };
            if write_message(&mut stream, &answer).await.is_err() {
                return;
            }
        }
    }

    /// The answer to a question, or nothing for what is no question.
    async fn answer(&self, question: &[u8], long: bool) -> Option<Vec<u8>> {
        let packet = Packet::parse(question).ok()?;
        let [asked] = &packet.questions[..] else { return None };
        let name = asked.qname.to_string().to_ascii_lowercase();
        let policy = self.shared.policy();
        if !policy.internet.may_resolve(name.trim_end_matches('.')) {
            metrics::counter!("rethaw_net_names_total", "outcome" => "refused").increment(1);
            return refusal(&packet, RCODE::Refused);
        }
        let answer = if long {
            self.resolver.ask_tcp(question).await
        } else {
            self.resolver.ask_udp(question).await
        };
        let outcome = match answer {
            Ok(answer) if matches!(policy.internet, Internet::Allow(_)) => {
                self.open_the_way(&answer).await.map(|()| answer)
            }
            other => other,
        };
        match outcome {
            Ok(answer) => {
                metrics::counter!("rethaw_net_names_total", "outcome" => "answered").increment(1);
                Some(answer)
            }
            Err(e) => {
                metrics::counter!("rethaw_net_names_total", "outcome" => "failed").increment(1);
                tracing::debug!(slot = self.shared.addresses.slot, %name, "no answer: {e}");
                refusal(&packet, RCODE::ServerFailure)
            }
        }
    }

    async fn open_the_way(&self, answer: &[u8]) -> io::Result<()> {
        let (addresses, time) = addresses(answer)?;
        if addresses.is_empty() {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        super::blocking(move || shared.allow_names(&addresses, time)).await
    }
}

/// The addresses in an answer, and for how long they are good.
fn addresses(answer: &[u8]) -> io::Result<(Vec<IpAddr>, Duration)> {
    let packet = Packet::parse(answer)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
    let mut found = Vec::new();
    let mut longest = LEAST;
    for record in &packet.answers {
        let address: IpAddr = match &record.rdata {
            RData::A(a) => Ipv4Addr::from(a.address).into(),
            RData::AAAA(aaaa) => Ipv6Addr::from(aaaa.address).into(),
            _ => continue,
        };
        longest = longest.max(Duration::from_secs(record.ttl.into()));
        found.push(address);
    }
    // A resolver in the guest may keep the answer to the last second of it.
    Ok((found, (longest + LEAST).min(MOST)))
}

fn refusal(question: &Packet<'_>, code: RCODE) -> Option<Vec<u8>> {
    let mut reply = Packet::new_reply(question.id());
    reply.questions.clone_from(&question.questions);
    *reply.rcode_mut() = code;
    reply.build_bytes_vec().ok()
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend(message);
    stream.write_all(&bytes).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_name_servers_are_read() {
        let text = "# a comment\nsearch example.com\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\n\
                    options edns0\nnameserver  2001:db8::53 \n";
        let servers: [IpAddr; 2] = ["192.0.2.1".parse().unwrap(), "2001:db8::53".parse().unwrap()];
        assert_eq!(host_servers(text), servers);
    }
}
