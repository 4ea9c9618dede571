//! Metrics: what is counted where it happens, and what is sampled when somebody asks.

use std::collections::HashMap;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::engine::Engine;

/// Upper bounds of the latency histograms, in seconds.
const BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0];

/// Installs the recorder; once per process.
pub fn install() -> anyhow::Result<PrometheusHandle> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_duration_seconds".to_owned()), BUCKETS)?
        .install_recorder()?;
    let build = metrics::gauge!("rethaw_build_info", "version" => env!("CARGO_PKG_VERSION"));
    build.set(1.0);
    Ok(handle)
}

/// Brings the gauges up to date.
pub fn sample(engine: &Engine) {
    for (template, numbers, _) in engine.pools() {
        let gauge = |name: &'static str, value: u32| {
            metrics::gauge!(name, "template" => template.clone()).set(f64::from(value));
        };
        gauge("rethaw_pool_ready", numbers.ready);
        gauge("rethaw_pool_target", numbers.target);
        gauge("rethaw_pool_restoring", numbers.restoring);
    }
    let mut states: HashMap<(String, &'static str), u32> = HashMap::new();
    for template in engine.templates() {
        // A state that nobody is in any more must read 0, not its last value.
        for state in ["running", "paused"] {
            states.insert((template.name.clone(), state), 0);
        }
    }
    for sandbox in engine.sandboxes() {
        *states.entry((sandbox.data().template, sandbox.state().as_str())).or_default() += 1;
    }
    for ((template, state), count) in states {
        metrics::gauge!("rethaw_sandboxes", "template" => template, "state" => state)
            .set(f64::from(count));
    }
    metrics::gauge!("rethaw_uptime_seconds").set(engine.uptime().as_secs_f64());
}
