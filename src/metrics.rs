//! Metrics: what is counted where it happens, and what is sampled when somebody asks. The list of
//! all is in [`catalogue`].

mod catalogue;
#[cfg(test)]
mod grafana;
mod process;

pub use process::text as process_text;

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use uffd_handler::stats::Stats;

use crate::engine::Engine;
use crate::engine::template::TemplateState;
use crate::net::Network;

/// Upper bounds of the latency histograms, in seconds.
const BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0];

/// Installs the recorder; once per process.
pub fn install() -> anyhow::Result<PrometheusHandle> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_duration_seconds".to_owned()), BUCKETS)?
        .install_recorder()?;
    catalogue::describe();
    let build = metrics::gauge!("rethaw_build_info", "version" => env!("CARGO_PKG_VERSION"));
    build.set(1.0);
    Ok(handle)
}

/// Brings the gauges up to date.
pub fn sample(engine: &Engine, viewers: usize) {
    metrics::gauge!("rethaw_viewers").set(viewers as f64);
    let names = seen(engine);
    let mut gone = names.clone();
    for (template, numbers, _) in engine.pools() {
        gone.remove(&template);
        let gauge = |name: &'static str, value: u32| {
            metrics::gauge!(name, "template" => template.clone()).set(f64::from(value));
        };
        gauge("rethaw_pool_ready", numbers.ready);
        gauge("rethaw_pool_target", numbers.target);
        gauge("rethaw_pool_restoring", numbers.restoring);
        start_at_zero(&template);
    }
    for template in gone {
        for name in ["rethaw_pool_ready", "rethaw_pool_target", "rethaw_pool_restoring"] {
            metrics::gauge!(name, "template" => template.clone()).set(0.0);
        }
    }
    templates(engine, &names);
    let mut states: HashMap<(String, &'static str), u32> = HashMap::new();
    for template in names {
        // A state that nobody is in any more must read 0, not its last value.
        for state in ["running", "paused"] {
            states.insert((template.clone(), state), 0);
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
    if let Some(net) = engine.network() {
        network(net);
    }
    page_server(&engine.pager().stats());
}

/// Slots, and packets by what became of them.
fn network(network: &Network) {
    let (ready, used) = network.slots();
    for (state, count) in [("ready", ready), ("used", used)] {
        metrics::gauge!("rethaw_net_slots", "state" => state).set(count as f64);
    }
    for (outcome, packets) in network.counted() {
        metrics::counter!("rethaw_net_packets_total", "outcome" => outcome).absolute(packets);
    }
}

/// What a pool has not done yet is 0, not unknown.
fn start_at_zero(template: &str) {
    let template = template.to_owned();
    drop(metrics::counter!("rethaw_pool_misses_total", "template" => template.clone()));
    drop(metrics::counter!("rethaw_pool_deaths_total", "template" => template.clone()));
    drop(
        metrics::histogram!("rethaw_pool_refill_duration_seconds", "template" => template.clone()),
    );
    for origin in ["warm", "restored"] {
        let labels = [("template", template.clone()), ("origin", origin.to_owned())];
        drop(metrics::histogram!("rethaw_sandbox_acquire_duration_seconds", &labels));
    }
    drop(metrics::counter!("rethaw_sandbox_acquire_failures_total", "template" => template));
}

/// Every template that there is or was since the start: the gauges of one that is gone read 0 from
/// then on, since a recorder forgets none.
fn seen(engine: &Engine) -> BTreeSet<String> {
    static SEEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    seen.extend(engine.templates().iter().map(|template| template.name.clone()));
    seen.clone()
}

fn templates(engine: &Engine, names: &BTreeSet<String>) {
    let mut states = HashMap::new();
    for template in engine.templates() {
        *states.entry(template.status().state.as_str()).or_insert(0_u32) += 1;
    }
    for name in names {
        let ready = engine.template(name).and_then(|template| template.ready());
        let bytes = ready.map_or(0, |ready| ready.manifest.allocated_bytes());
        metrics::gauge!("rethaw_template_disk_bytes", "template" => name.clone()).set(bytes as f64);
    }
    for state in TemplateState::ALL.map(TemplateState::as_str) {
        let count = states.get(state).copied().unwrap_or(0);
        metrics::gauge!("rethaw_templates", "state" => state).set(f64::from(count));
    }
}

/// The page server's counts, kept by its supervisor over takeovers.
fn page_server(stats: &Stats) {
    let faults = [
        ("data", stats.faults_data),
        ("zero", stats.faults_zero),
        ("present", stats.faults_present),
        ("removed", stats.faults_removed),
    ];
    for (kind, count) in faults {
        metrics::counter!("rethaw_uffd_faults_total", "kind" => kind).absolute(count);
    }
    let counts = [
        ("rethaw_uffd_removes_total", stats.removes),
        ("rethaw_uffd_copied_bytes_total", stats.bytes_copied),
        ("rethaw_uffd_prefetched_pages_total", stats.prefetched),
        ("rethaw_uffd_prefetched_zero_pages_total", stats.prefetched_zero),
        ("rethaw_uffd_graduated_pages_total", stats.filled),
        ("rethaw_uffd_write_faults_total", stats.faults_write),
        ("rethaw_uffd_parked_faults_total", stats.faults_parked),
        ("rethaw_uffd_working_set_late_total", stats.working_set_late),
        ("rethaw_uffd_working_set_miss_total", stats.working_set_miss),
        ("rethaw_uffd_takeovers_total", stats.takeovers),
        ("rethaw_uffd_source_retries_total", stats.source_retries),
    ];
    for (name, count) in counts {
        metrics::counter!(name).absolute(count);
    }
    if let Some(ratio) = stats.working_set_hit_ratio() {
        metrics::gauge!("rethaw_uffd_working_set_hit_ratio").set(ratio);
    }
}

/// The page server's fault latency as a Prometheus histogram. It is counted in the page server's
/// own power-of-two buckets, which the recorder of this process cannot take over.
pub fn fault_histogram(engine: &Engine) -> String {
    let stats = engine.pager().stats();
    let name = catalogue::FAULT_DURATION;
    let meaning = catalogue::meaning(name);
    let mut text = format!("# HELP {name} {meaning}\n# TYPE {name} histogram\n");
    let mut total = 0;
    for (i, count) in stats.latency_buckets.iter().enumerate() {
        total += count;
        let bound = (1_u64 << i) as f64 / 1e6;
        // The last bucket takes all that is slower.
        if i + 1 < stats.latency_buckets.len() {
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {total}");
        }
    }
    let sum = stats.fault_nanos as f64 / 1e9;
    let _ = writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {total}");
    let _ = writeln!(text, "{name}_sum {sum}\n{name}_count {total}");
    text
}
