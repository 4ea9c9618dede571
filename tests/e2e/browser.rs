//! A real Chromium without a window, driven over WebDriver.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::client::{Client, DEADLINE, within};
use crate::process::processes_of;

/// Keys that are no characters, as WebDriver numbers them.
pub mod key {
    pub const TAB: char = '\u{e004}';
    pub const ENTER: char = '\u{e007}';
    pub const ESCAPE: char = '\u{e00c}';
    pub const LEFT: char = '\u{e012}';
}

/// What one needs as root, and what keeps the browser from talking to anybody by itself.
const FLAGS: &[&str] = &[
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--window-size=1440,1400",
];

/// A browser with a profile of its own. Its processes end with it.
pub struct Browser {
    // WebDriver is JSON over HTTP, and this is its client; its paths are below the session.
    client: Client,
    session: String,
    driver: Child,
    profile: PathBuf,
}

impl Browser {
    /// Starts it; its files go below `home`.
    pub async fn start(home: &Path) -> Self {
        let profile = home.join("browser");
        std::fs::create_dir_all(&profile).unwrap();
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .current_dir(&profile)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver, from the Debian package chromium-driver: scripts/setup");
        let said = driver.stdout.take().unwrap();
        let port = tokio::task::spawn_blocking(move || port_in(BufReader::new(said)));
        let port = within("chromedriver's port", port).await.unwrap();
        let mut flags: Vec<String> = FLAGS.iter().map(|flag| (*flag).to_owned()).collect();
        flags.push(format!("--user-data-dir={}", profile.join("data").display()));
        let always = json!({
            "browserName": "chrome",
            "goog:chromeOptions": { "binary": "/usr/bin/chromium", "args": flags },
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        });
        let client = Client::new(format!("http://127.0.0.1:{port}"), None);
        let mut browser = Self { client, session: String::new(), driver, profile };
        let capabilities = json!({ "capabilities": { "alwaysMatch": always } });
        let made = browser.command("", &capabilities).await;
        browser.session = format!("/{}", made["sessionId"].as_str().unwrap());
        browser
    }

    /// A command with its parameters; gives the value that comes back.
    async fn command(&self, path: &str, body: &Value) -> Value {
        let path = format!("/session{}{path}", self.session);
        self.client.post(&path, body).await.expect(200)["value"].take()
    }

    pub async fn go(&self, url: &str) {
        self.command("/url", &json!({ "url": url })).await;
    }

    /// What a script returns.
    pub async fn run(&self, script: &str) -> Value {
        self.command("/execute/sync", &json!({ "script": script, "args": [] })).await
    }

    /// The value of an expression.
    pub async fn value(&self, expression: &str) -> Value {
        self.run(&format!("return ({expression})")).await
    }

    /// Waits until an expression is true.
    pub async fn until(&self, expression: &str) {
        let started = Instant::now();
        while self.value(&format!("Boolean({expression})")).await != true {
            if started.elapsed() > DEADLINE {
                let text = self.value("document.body.innerText").await;
                panic!("never true: {expression}\n{text}\nconsole: {:?}", self.console().await);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Presses keys one after the other, as a person without a mouse does.
    pub async fn press(&self, keys: &[char]) {
        let pressed = keys.iter().flat_map(|key| {
            let value = key.to_string();
            [
                json!({ "type": "keyDown", "value": value }),
                json!({ "type": "keyUp", "value": value }),
            ]
        });
        let pressed: Vec<Value> = pressed.collect();
        let keyboard = json!({ "type": "key", "id": "keyboard", "actions": pressed });
        self.command("/actions", &json!({ "actions": [keyboard] })).await;
    }

    pub async fn type_text(&self, text: &str) {
        self.press(&text.chars().collect::<Vec<_>>()).await;
    }

    /// Moves the focus on until an expression about `document.activeElement`, called `e`, is true.
    pub async fn tab_to(&self, wanted: &str) {
        for _ in 0..80 {
            self.press(&[key::TAB]).await;
            let script = format!("const e = document.activeElement; return Boolean({wanted})");
            if self.run(&script).await == true {
                return;
            }
        }
        panic!("the tab key never gets to {wanted}");
    }

    /// A command of Chromium's own debugging protocol.
    pub async fn protocol(&self, name: &str, params: &Value) -> Value {
        self.command("/goog/cdp/execute", &json!({ "cmd": name, "params": params })).await
    }

    /// The colours that the system asks for.
    pub async fn prefer(&self, scheme: &str, reduced_motion: bool) {
        let motion = if reduced_motion { "reduce" } else { "no-preference" };
        let features = json!([
            { "name": "prefers-color-scheme", "value": scheme },
            { "name": "prefers-reduced-motion", "value": motion },
        ]);
        self.protocol("Emulation.setEmulatedMedia", &json!({ "features": features })).await;
    }

    async fn log(&self, kind: &str) -> Vec<Value> {
        let entries = self.command("/se/log", &json!({ "type": kind })).await;
        entries.as_array().unwrap().clone()
    }

    /// What the console said since the last look: errors, warnings, refusals of the policy.
    pub async fn console(&self) -> Vec<String> {
        let entries = self.log("browser").await;
        entries.iter().map(|entry| format!("{} {}", entry["level"], entry["message"])).collect()
    }

    /// Every address asked for since the last look.
    pub async fn requests(&self) -> Vec<String> {
        let entries = self.log("performance").await;
        let url = |entry: &Value| {
            let message: Value = serde_json::from_str(entry["message"].as_str()?).ok()?;
            let message = &message["message"];
            let sent = message["method"] == "Network.requestWillBeSent";
            sent.then(|| message["params"]["request"]["url"].as_str().map(str::to_owned))?
        };
        entries.iter().filter_map(url).collect()
    }

    /// Keeps a picture of the page as `target/NAME.png`.
    pub async fn picture(&self, name: &str) {
        let reply = self.client.get(&format!("/session{}/screenshot", self.session)).await;
        let png = STANDARD.decode(reply.expect(200)["value"].as_str().unwrap()).unwrap();
        assert!(png.starts_with(b"\x89PNG"), "{name}");
        let target = Path::new(env!("CARGO_BIN_EXE_rethaw")).parent().and_then(Path::parent);
        let dir = target.unwrap().join("screenshots");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(format!("{name}.png")), png).unwrap();
    }

    pub async fn stop(self) {
        self.client.delete(&format!("/session{}", self.session)).await.expect(200);
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        for process in processes_of(&self.profile) {
            process.kill();
        }
    }
}

fn port_in(mut said: impl BufRead) -> u16 {
    let mut line = String::new();
    while said.read_line(&mut line).unwrap() > 0 {
        let port = line
            .split(" successfully on port ")
            .nth(1)
            .and_then(|rest| rest.trim().trim_end_matches('.').parse().ok());
        if let Some(port) = port {
            return port;
        }
        line.clear();
    }
    panic!("chromedriver ended without having said its port");
}
