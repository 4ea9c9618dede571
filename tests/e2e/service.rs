//! A running service, and the few things every test asks of it.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::client::{Client, DEADLINE, Reply};
use crate::home::Home;
use crate::process::Process;

const STEP: Duration = Duration::from_millis(20);

/// Where `rethaw`, the page server, the shim and the static agent are.
fn bin_dir() -> PathBuf {
    let target = PathBuf::from(env!("CARGO_BIN_EXE_rethaw"));
    let target = target.parent().and_then(std::path::Path::parent).unwrap();
    std::env::var_os("RETHAW_BIN_DIR").map_or_else(|| target.join("release"), PathBuf::from)
}

/// `rethaw` as a command with nothing from this environment that could lead it elsewhere.
pub fn rethaw() -> Command {
    let binary = bin_dir().join("rethaw");
    assert!(binary.is_file(), "{} is missing: build it with `make build`", binary.display());
    let mut command = Command::new(binary);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("RETHAW_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// A service on a home of its own.
#[derive(Debug)]
pub struct Service {
    child: Child,
    client: Client,
    options: Vec<String>,
    starts: u32,
    // Last: what is left when the service ended goes with it.
    home: Home,
}

/// What a command left: `{exit_code, stdout, stderr, ...}`.
#[derive(Debug)]
pub struct Done(pub Value);

impl Done {
    pub fn code(&self) -> i64 {
        self.0["exit_code"].as_i64().unwrap()
    }

    pub fn stdout(&self) -> &str {
        self.0["stdout"].as_str().unwrap()
    }

    pub fn stderr(&self) -> &str {
        self.0["stderr"].as_str().unwrap()
    }
}

impl Service {
    /// A service with a pool of this size, full.
    pub async fn start(pool: u32) -> Self {
        Self::start_with(pool, &[]).await
    }

    /// The same, with these flags besides.
    pub async fn start_with(pool: u32, flags: &[&str]) -> Self {
        let service = Self::start_on(Home::new().await, pool, flags, DEADLINE).await;
        service.pool_full(pool).await;
        service
    }

    /// The same, with this configuration file.
    pub async fn start_configured(pool: u32, config: &str) -> Self {
        let home = Home::new().await;
        let path = home.path().join("rethaw.toml");
        std::fs::write(&path, config).unwrap();
        let flags = ["--config", path.to_str().unwrap()];
        let service = Self::start_on(home, pool, &flags, DEADLINE).await;
        service.pool_full(pool).await;
        service
    }

    /// A service that is asked through its Unix socket, by the command line.
    pub async fn start_by_socket(flags: &[&str], socket: &str) -> Self {
        let home = Home::new().await;
        let mut options = vec!["--pool-target".to_owned(), "0".to_owned()];
        options.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let child = spawn(&home, &options, 0, &[]);
        let client = Client::new(format!("unix:{socket}"), None);
        let service = Self { child, client, options, starts: 0, home };
        service
            .until("the template is ready", async || {
                let list = service.cli(&["template", "ls", "--json"]).await;
                let list: Option<Value> = serde_json::from_slice(&list.stdout).ok();
                (list?["items"][0]["state"] == "ready").then_some(())
            })
            .await;
        service
    }

    /// The first URL of this kind that the service said it listens on.
    pub fn listening_on(&self, scheme: &str) -> String {
        let log = self.log();
        let urls = log.lines().filter_map(|line| line.split_once("listening on "));
        let url = urls.map(|(_, url)| url.trim()).find(|url| url.starts_with(scheme));
        url.unwrap_or_else(|| panic!("no {scheme} in:\n{log}")).to_owned()
    }

    /// A client's key at this service, which may have started again elsewhere.
    pub fn reach(&self, client: &Client) -> Client {
        self.client.with_key(client.key())
    }

    /// A service on this home; ready, its pool filling.
    pub async fn start_on(home: Home, pool: u32, flags: &[&str], deadline: Duration) -> Self {
        let mut options = vec!["--pool-target".to_owned(), pool.to_string()];
        // The same tests with another driver; see with_firecracker.
        if let Ok(vmm) = std::env::var("RETHAW_TEST_VMM") {
            options.extend(["--vmm".to_owned(), vmm]);
        }
        options.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let child = spawn(&home, &options, 0, &[]);
        let client = Client::new(String::new(), None);
        let mut service = Self { child, client, options, starts: 0, home };
        service.wait_ready(deadline).await;
        service
    }

    pub fn home(&self) -> &Home {
        &self.home
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    pub fn key(&self) -> String {
        let key = std::fs::read_to_string(self.home.path().join("api-key")).unwrap();
        key.trim().to_owned()
    }

    /// The service itself, as a process.
    pub fn process(&self) -> Process {
        Process::read(self.child.id().cast_signed()).expect("the service runs")
    }

    pub fn log(&self) -> String {
        let path = self.home.path().join(format!("service-{}.log", self.starts));
        std::fs::read_to_string(path).unwrap_or_default()
    }

    async fn wait_ready(&mut self, deadline: Duration) {
        let started = Instant::now();
        let url = loop {
            let log = self.log();
            let said = log.lines().find_map(|line| line.split_once("listening on "));
            if let Some((_, url)) = said {
                break url.trim().to_owned();
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the service ended with {status}:\n{log}");
            }
            assert!(started.elapsed() < deadline, "no address in:\n{log}");
            tokio::time::sleep(STEP).await;
        };
        self.client = Client::new(url, Some(self.key()));
        loop {
            let reply = self.client.get("/readyz").await;
            if reply.status == 200 {
                return;
            }
            assert_ne!(reply.value()["status"], "failed", "{}", reply.text());
            assert!(started.elapsed() < deadline, "not ready: {}", reply.text());
            tokio::time::sleep(STEP * 5).await;
        }
    }

    /// Waits until as many VMs are parked, and none is on its way.
    pub async fn pool_full(&self, size: u32) -> Value {
        self.until("the pool is full", async || {
            let pool = self.client.get("/v1/pools/base").await;
            // Opened a moment after the template is ready.
            if pool.status == 404 {
                return None;
            }
            let pool = pool.expect(200);
            (pool["ready"] == size && pool["restoring"] == 0).then_some(pool)
        })
        .await
    }

    pub async fn set_pool(&self, target: u32) {
        self.client.json("PUT", "/v1/pools/base", &json!({ "target": target })).await.expect(200);
        self.pool_full(target).await;
    }

    /// Asks again and again until there is something.
    pub async fn until<T>(&self, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            if let Some(found) = look().await {
                return found;
            }
            assert!(started.elapsed() < DEADLINE, "never came: {what}\n{}", self.log());
            tokio::time::sleep(STEP).await;
        }
    }

    /// A sandbox of `base` with these fields besides.
    pub async fn create_with(&self, more: &Value) -> Value {
        let mut body = json!({ "template": "base" });
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        self.client.post("/v1/sandboxes", &body).await.expect(201)
    }

    /// A sandbox; gives its id.
    pub async fn create(&self) -> String {
        id(&self.create_with(&json!({})).await)
    }

    pub async fn sandbox(&self, id: &str) -> Reply {
        self.client.get(&format!("/v1/sandboxes/{id}")).await
    }

    /// What a `POST /v1/sandboxes/{id}/{action}` gives.
    pub async fn act(&self, id: &str, action: &str, body: &Value) -> Reply {
        self.client.post(&format!("/v1/sandboxes/{id}/{action}"), body).await
    }

    /// Runs a command to its end, as the API answers it.
    pub async fn try_exec(&self, id: &str, body: &Value) -> Reply {
        self.client.post(&format!("/v1/sandboxes/{id}/exec?buffered=true"), body).await
    }

    pub async fn exec(&self, id: &str, body: &Value) -> Done {
        Done(self.try_exec(id, body).await.expect(200))
    }

    /// Standard output of a shell script that must succeed, without the white space around it.
    pub async fn sh(&self, id: &str, script: &str) -> String {
        let done = self.exec(id, &json!({ "argv": ["sh", "-ec", script] })).await;
        assert_eq!(done.code(), 0, "{script}: {}", done.0);
        done.stdout().trim().to_owned()
    }

    /// Waits until the API does not know the sandbox any more.
    pub async fn sandbox_gone(&self, id: &str) {
        self.until("the sandbox is gone", async || {
            (self.sandbox(id).await.status == 404).then_some(())
        })
        .await;
    }

    /// The command line as a user of this service would run it.
    pub async fn cli(&self, args: &[&str]) -> Output {
        let mut command = rethaw();
        command.env("RETHAW_URL", self.client.url()).env("RETHAW_HOME", self.home.path());
        command.args(args);
        let run = tokio::task::spawn_blocking(move || command.output().unwrap());
        crate::client::within(&format!("rethaw {args:?}"), run).await.unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    async fn ended(&mut self) -> std::process::ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < DEADLINE, "does not end:\n{}", self.log());
            tokio::time::sleep(STEP).await;
        }
    }

    /// Kills the service itself, and nothing else.
    pub async fn crash(&mut self) {
        self.signal(Signal::SIGKILL);
        self.ended().await;
    }

    /// Asks it to stop, as an init system would.
    pub async fn terminate(&mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.ended().await;
        assert!(status.success(), "{status}:\n{}", self.log());
    }

    /// Starts it again on the same home.
    pub async fn start_again(&mut self) {
        self.start_again_with(&[]).await;
    }

    /// The same, with these environment variables.
    pub async fn start_again_with(&mut self, env: &[(&str, &str)]) {
        self.starts += 1;
        self.child = spawn(&self.home, &self.options, self.starts, env);
        self.wait_ready(DEADLINE).await;
    }

    /// Waits until it has ended by itself.
    pub async fn died(&mut self) {
        self.ended().await;
    }

    /// Stops it and looks whether anything is left.
    pub async fn stop(mut self) {
        self.terminate().await;
        self.nothing_left();
    }

    pub fn nothing_left(&self) {
        assert_eq!(self.home.processes(), [], "processes");
        assert_eq!(self.home.sockets(), Vec::<PathBuf>::new(), "sockets");
        assert_eq!(self.home.mounts(), Vec::<String>::new(), "mounts");
        assert_eq!(self.home.vm_dirs(), Vec::<String>::new(), "VM directories");
        let tmp = std::fs::read_dir(self.home.path().join("tmp")).unwrap().flatten();
        let tmp: Vec<_> = tmp.map(|e| e.path()).collect();
        assert_eq!(tmp, Vec::<PathBuf>::new(), "temporary files");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let from = log.lines().count().saturating_sub(60);
            eprintln!("--- the service's log, its end:");
            log.lines().skip(from).for_each(|line| eprintln!("{line}"));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(home: &Home, options: &[String], start: u32, env: &[(&str, &str)]) -> Child {
    let log = std::fs::File::create(home.path().join(format!("service-{start}.log"))).unwrap();
    let mut command = rethaw();
    command
        .args(["serve", "--listen", "127.0.0.1:0"])
        .arg("--home")
        .arg(home.path())
        .args(options)
        .env("NO_COLOR", "1")
        // Where a test does not make a network of its own, the machine's is left alone.
        .env("RETHAW_NETWORK", "off")
        .envs(env.iter().copied())
        .stdout(Stdio::null())
        .stderr(log);
    command.spawn().unwrap()
}

/// The id in a sandbox object.
pub fn id(sandbox: &Value) -> String {
    let id = sandbox["id"].as_str().unwrap_or_default();
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    assert!(id.len() == 20 && id.bytes().all(fits), "{sandbox}");
    id.to_owned()
}
