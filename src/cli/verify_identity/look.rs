//! One look into a clone: what a program that has just been started there finds.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use hyper::Method;
use serde_json::{Value, json};

use crate::cli::Context;

/// Longest time for the look, in the guest and over all.
const GUEST_SECONDS: u64 = 30;
const DEADLINE: Duration = Duration::from_secs(60);

/// Prints `name=value` lines. The clock comes first; Python only where the template has it.
const SCRIPT: &str = r#"
echo "clock=$(date +%s.%N)"
echo "urandom=$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n')"
echo "kernel_uuid=$(cat /proc/sys/kernel/random/uuid)"
echo "boot_id=$(cat /proc/sys/kernel/random/boot_id)"
echo "machine_id=$(cat /etc/machine-id)"
echo "hostname=$(cat /proc/sys/kernel/hostname)"
echo "generation=$(cat /run/rethaw/generation)"
if [ -e /sys/class/net/eth0/address ]; then echo "mac=$(cat /sys/class/net/eth0/address)"; fi
if command -v python3 >/dev/null; then python3 -c '
import os, random, uuid
print("getrandom=" + os.getrandom(32).hex())
print("python_random=" + repr(random.random()))
print("python_uuid=" + str(uuid.uuid4()))
'; fi
"#;

/// What was found.
#[derive(Debug)]
pub struct Look {
    /// By name.
    pub values: BTreeMap<String, String>,
    /// How far the clock is from anything it could have shown, in milliseconds.
    pub clock_error_ms: f64,
}

/// Runs the script and takes its output apart.
pub async fn into(cx: &Context, id: &str) -> anyhow::Result<Look> {
    let path = format!("/v1/sandboxes/{id}/exec?buffered=true");
    let body = json!({ "argv": ["sh", "-c", SCRIPT], "timeout_seconds": GUEST_SECONDS });
    let now = || std::time::UNIX_EPOCH.elapsed().map_or(0.0, |t| t.as_secs_f64() * 1e3);
    let before = now();
    let reply: Value = cx.client.json(Method::POST, &path, Some(&body), DEADLINE).await?;
    let after = now();
    let failed = || format!("looking into sandbox {id} failed: {reply}");
    anyhow::ensure!(reply["exit_code"] == 0, failed());
    let mut values = parse(reply["stdout"].as_str().with_context(failed)?);
    let clock = values.remove("clock").and_then(|text| text.parse::<f64>().ok());
    let clock = clock.with_context(failed)? * 1e3;
    Ok(Look { values, clock_error_ms: outside(clock, before, after) })
}

fn parse(text: &str) -> BTreeMap<String, String> {
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// How far `at` is from the span between two moments.
fn outside(at: f64, before: f64, after: f64) -> f64 {
    (before - at).max(at - after).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_is_understood() {
        let values = parse("clock=1.5\nhostname=a=b\nnoise\n");
        assert_eq!((values["clock"].as_str(), values["hostname"].as_str()), ("1.5", "a=b"));
        assert_eq!(values.len(), 2);
    }

    #[test]
    fn only_what_cannot_be_is_an_error() {
        assert!((outside(5.0, 4.0, 6.0)).abs() < 1e-9);
        assert!((outside(3.0, 4.0, 6.0) - 1.0).abs() < 1e-9);
        assert!((outside(8.0, 4.0, 6.0) - 2.0).abs() < 1e-9);
    }
}
