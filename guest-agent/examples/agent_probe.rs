//! Talks to the agent behind a virtio-serial socket and prints answers and times: for looking into
//! one VM, and for measuring what each call costs in it.
//!
//! ```text
//! agent_probe SOCKET boot|health|settle|freeze|resume|identity|claim [-n COUNT]
//! agent_probe SOCKET put FILE PATH
//! agent_probe SOCKET exec ARGV... [-n COUNT]
//! ```

use guest_agent::client::AgentClient;
use guest_agent::wire::{
    Base64, ClaimRequest, ExecFrame, ExecRequest, FreezeRequest, IdentityRequest, Ipv4Config,
    ResumeRequest, SettleRequest,
};
use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const DEADLINE: Duration = Duration::from_secs(60);

fn now() -> Result<u64, Box<dyn Error>> {
    Ok(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos())?)
}

fn random<const N: usize>() -> Result<[u8; N], Box<dyn Error>> {
    use std::io::Read as _;
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn uuid() -> Result<String, Box<dyn Error>> {
    let hex = hex::encode(random::<16>()?);
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    Ok(parts.join("-"))
}

fn identity() -> Result<IdentityRequest, Box<dyn Error>> {
    let tail = random::<4>()?;
    Ok(IdentityRequest {
        generation: uuid()?,
        entropy: Base64(random::<64>()?.to_vec()),
        wall_clock_unix_nanos: now()?,
        mac: Some(format!("02:00:{:02x}:{:02x}:{:02x}:{:02x}", tail[0], tail[1], tail[2], tail[3])),
        ipv4: Some(Ipv4Config {
            cidr: format!("10.1.{}.2/30", tail[0]),
            gateway: Some(format!("10.1.{}.1", tail[0])),
        }),
        hostname: format!("vm-{}", hex::encode(tail)),
        machine_id: hex::encode(random::<16>()?),
        boot_id: uuid()?,
        ..Default::default()
    })
}

async fn exec(
    client: &AgentClient,
    argv: &[String],
    show: bool,
) -> Result<Duration, Box<dyn Error>> {
    let since = Instant::now();
    let request = ExecRequest { argv: argv.to_vec(), ..Default::default() };
    let mut stream = client.exec(&request, DEADLINE).await?;
    let mut first = None;
    while let Some(frame) = stream.next_frame().await? {
        if matches!(frame, ExecFrame::Stdout(_)) {
            first.get_or_insert_with(|| since.elapsed());
        }
        if show {
            println!("{}", serde_json::to_string(&frame)?);
        }
    }
    if show {
        println!("first output after {first:?}");
    }
    Ok(since.elapsed())
}

async fn once(
    client: &AgentClient,
    what: &[String],
    show: bool,
) -> Result<Duration, Box<dyn Error>> {
    let since = Instant::now();
    let answer = match what[0].as_str() {
        "boot" => serde_json::to_string_pretty(&client.boot_wait(DEADLINE).await?)?,
        "health" => serde_json::to_string(&client.health(DEADLINE).await?)?,
        "settle" => {
            serde_json::to_string(&client.settle(&SettleRequest::default(), DEADLINE).await?)?
        }
        "freeze" => {
            serde_json::to_string(&client.freeze(&FreezeRequest::default(), DEADLINE).await?)?
        }
        "resume" => {
            let request = ResumeRequest {
                entropy: Base64(random::<64>()?.to_vec()),
                wall_clock_unix_nanos: now()?,
                ..Default::default()
            };
            serde_json::to_string(&client.resume(&request, DEADLINE).await?)?
        }
        "identity" => {
            let request = identity()?;
            let report = client.identity(&request, DEADLINE).await?;
            let text = serde_json::to_string_pretty(&report)?;
            if let Err(failure) = report.prove(&request) {
                println!("{text}");
                return Err(failure.into());
            }
            text
        }
        "claim" => {
            let request = ClaimRequest {
                wall_clock_unix_nanos: now()?,
                access_token: Some(hex::encode(random::<16>()?)),
                ..Default::default()
            };
            serde_json::to_string(&client.claim(&request, DEADLINE).await?)?
        }
        "put" if what.len() == 3 => {
            let uri = format!("/files?path={}&mode=755", what[2]);
            let body = guest_agent::client::full_body(std::fs::read(&what[1])?);
            let request = hyper::http::Request::put(uri).body(body)?;
            client.send(request).await?.status().to_string()
        }
        "exec" => return exec(client, &what[1..], show).await,
        other => return Err(format!("unknown call {other}").into()),
    };
    let took = since.elapsed();
    if show {
        println!("{answer}");
    }
    Ok(took)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let mut count = 1usize;
    if args.len() > 2 && args[args.len() - 2] == "-n" {
        count = args[args.len() - 1].parse()?;
        args.truncate(args.len() - 2);
    }
    let [socket, what @ ..] = &args[..] else { return Err("SOCKET CALL ...".into()) };
    if what.is_empty() {
        return Err("which call?".into());
    }
    let since = Instant::now();
    let client = AgentClient::connect_serial(Path::new(socket), DEADLINE).await?;
    println!("connected after {:?}", since.elapsed());
    let mut times = Vec::with_capacity(count);
    for i in 0..count {
        times.push(once(&client, what, i == 0).await?);
    }
    times.sort();
    let at = |p: usize| times[(times.len() * p / 100).min(times.len() - 1)];
    println!("{} x{count}: p50 {:?} p90 {:?} max {:?}", what[0], at(50), at(90), at(100));
    Ok(())
}
