//! `rethaw version`: this program's, and the service's when it answers.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::client::{Client, ClientError};
use super::{Global, output};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Prints the versions. A service that is not there is no failure: this program has a version still.
pub async fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let service = match Client::new(global) {
        Ok(client) => client.get::<Value>("/v1/info").await,
        Err(e) => Err(e),
    };
    if global.json {
        let service = service.unwrap_or(Value::Null);
        output::json(&json!({ "version": VERSION, "service": service }))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&format!("rethaw {VERSION}"))?;
    match service {
        Ok(info) => {
            let text = |field: &str| info[field].as_str().unwrap_or("unknown").to_owned();
            output::line(&format!("service {} ({})", text("version"), text("vmm")))?;
        }
        Err(ClientError::NotRunning { url }) => {
            output::line(&format!("service not running at {url}"))?;
        }
        Err(e) => output::line(&format!("service unknown: {e}"))?,
    }
    Ok(ExitCode::SUCCESS)
}
