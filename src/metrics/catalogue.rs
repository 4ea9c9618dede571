//! Every metric there is: name, kind, unit, labels, meaning. What `/metrics` explains, the table in
//! `docs/operations.md` and this list are one and the same; tests compare them.

use metrics::Unit;

/// What can be done with its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only ever grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Values by size.
    Histogram,
}

/// One metric.
#[derive(Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// `seconds`, `bytes`, `ratio`, or what is counted.
    pub unit: &'static str,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub meaning: &'static str,
}

const fn counter(
    name: &'static str,
    unit: &'static str,
    labels: &'static [&'static str],
    meaning: &'static str,
) -> Metric {
    Metric { name, kind: Kind::Counter, unit, labels, meaning }
}

const fn gauge(
    name: &'static str,
    unit: &'static str,
    labels: &'static [&'static str],
    meaning: &'static str,
) -> Metric {
    Metric { name, kind: Kind::Gauge, unit, labels, meaning }
}

const fn timer(
    name: &'static str,
    labels: &'static [&'static str],
    meaning: &'static str,
) -> Metric {
    Metric { name, kind: Kind::Histogram, unit: "seconds", labels, meaning }
}

/// All of rethaw's own, by subject. Those of the process have the names and meanings that Prometheus
/// gives them.
pub const ALL: &[Metric] = &[
    gauge("rethaw_build_info", "1", &["version"], "Always 1; the label says what runs"),
    gauge("rethaw_uptime_seconds", "seconds", &[], "Since the service started"),
    counter("rethaw_http_requests_total", "requests", &["method", "route", "code"], "Answered"),
    timer(
        "rethaw_http_request_duration_seconds",
        &["method", "route"],
        "From a request's head to the head of its answer",
    ),
    gauge("rethaw_viewers", "streams", &[], "Open event streams: dashboards and `rethaw top`"),
    timer(
        "rethaw_sandbox_acquire_duration_seconds",
        &["template", "origin"],
        "From a request for a sandbox to the sandbox; origin `warm` came from the pool, `restored` \
         waited for a restore",
    ),
    counter(
        "rethaw_sandbox_acquire_failures_total",
        "requests",
        &["template"],
        "Requests for a sandbox that ended without one",
    ),
    gauge("rethaw_sandboxes", "sandboxes", &["template", "state"], "There now"),
    counter(
        "rethaw_sandboxes_gone_total",
        "sandboxes",
        &["reason"],
        "Removed: `deleted`, `expired`, `vm_died`, `shutdown`",
    ),
    counter("rethaw_exec_total", "commands", &[], "Commands started"),
    timer("rethaw_pause_duration_seconds", &[], "From the request to memory freed"),
    timer("rethaw_resume_duration_seconds", &[], "From the request to processes running"),
    timer("rethaw_fork_stop_duration_seconds", &[], "For how long a fork stopped its source"),
    gauge("rethaw_pool_ready", "VMs", &["template"], "Parked, with a proven identity"),
    gauge("rethaw_pool_target", "VMs", &["template"], "How many should be parked"),
    gauge("rethaw_pool_restoring", "VMs", &["template"], "On their way to the pool"),
    counter("rethaw_pool_misses_total", "claims", &["template"], "Found the pool empty"),
    counter("rethaw_pool_deaths_total", "VMs", &["template"], "Died while parked; replaced"),
    timer(
        "rethaw_pool_refill_duration_seconds",
        &["template"],
        "From the start of a restore in the background to the VM parked",
    ),
    timer(
        "rethaw_restore_phase_duration_seconds",
        &["phase"],
        "Phases of a restore, as in `timings_ms`; `restore` is the whole of it",
    ),
    counter(
        "rethaw_identity_total",
        "VMs",
        &["outcome"],
        "Identities `proven`, or `failed`, which destroyed the VM; should stay 0",
    ),
    counter("rethaw_port_requests_total", "requests", &[], "Passed on to ports of sandboxes"),
    gauge(
        "rethaw_net_slots",
        "slots",
        &["state"],
        "Networks for VMs: `ready` and `used`; absent without networks",
    ),
    timer("rethaw_net_slot_prepare_duration_seconds", &[], "Making one such network"),
    counter(
        "rethaw_net_packets_total",
        "packets",
        &["outcome"],
        "Of sandboxes, by what became of them; absent without networks",
    ),
    counter(
        "rethaw_net_names_total",
        "names",
        &["outcome"],
        "Looked up by sandboxes: `answered`, `refused` by their policy, or `failed`",
    ),
    gauge("rethaw_templates", "templates", &["state"], "There now"),
    gauge("rethaw_template_disk_bytes", "bytes", &["template"], "Taken on disk by its snapshot"),
    counter(
        "rethaw_uffd_faults_total",
        "faults",
        &["kind"],
        "Demand faults, by what answered them",
    ),
    timer(FAULT_DURATION, &[], "From a fault being read to being answered, in powers of two"),
    counter("rethaw_uffd_write_faults_total", "faults", &[], "Of those, writes"),
    counter("rethaw_uffd_parked_faults_total", "faults", &[], "That had to be tried again"),
    counter("rethaw_uffd_removes_total", "ranges", &[], "Given back by VMMs"),
    counter("rethaw_uffd_copied_bytes_total", "bytes", &[], "Put into guests"),
    counter(
        "rethaw_uffd_prefetched_pages_total",
        "pages",
        &[],
        "Put in place before they were asked for",
    ),
    counter(
        "rethaw_uffd_prefetched_zero_pages_total",
        "pages",
        &[],
        "Of zeros, put in place before they were asked for",
    ),
    counter(
        "rethaw_uffd_graduated_pages_total",
        "pages",
        &[],
        "Put in place so that a VM needs no page server any more",
    ),
    counter("rethaw_vms_graduated_total", "VMs", &[], "That need no page server any more"),
    counter(
        "rethaw_uffd_working_set_late_total",
        "faults",
        &[],
        "On working-set pages not yet in place",
    ),
    counter(
        "rethaw_uffd_working_set_miss_total",
        "faults",
        &[],
        "On pages outside of the working set",
    ),
    gauge(
        "rethaw_uffd_working_set_hit_ratio",
        "ratio",
        &[],
        "Of the pages wanted, those in place before; absent before the first prefetch",
    ),
    counter(
        "rethaw_uffd_source_retries_total",
        "reads",
        &[],
        "Of saved pages, that failed and were repeated",
    ),
    counter("rethaw_uffd_takeovers_total", "VMs", &[], "Taken over by a new page server"),
    counter(
        "rethaw_pager_takeovers_total",
        "processes",
        &[],
        "Page servers that died and were replaced",
    ),
    counter("rethaw_vms_lost_total", "VMs", &[], "Killed because their memory could not be served"),
    counter(
        "rethaw_vms_recovered_total",
        "VMs",
        &["outcome"],
        "Found at start from an earlier service: `serving` again, or `lost`",
    ),
    counter(
        "rethaw_audit_lost_total",
        "lines",
        &[],
        "Of the audit log, dropped because it could not be written fast enough",
    ),
    counter(
        "rethaw_builds_total",
        "builds",
        &["outcome"],
        "Of templates that ended: `built`, `cached` (built before), `failed`",
    ),
    timer("rethaw_build_duration_seconds", &[], "From a restored parent to a published template"),
];

/// The one that the recorder does not keep: the page server counts it.
pub const FAULT_DURATION: &str = "rethaw_uffd_fault_duration_seconds";

/// Tells the recorder about all of them, and starts what can start at 0: a counter that first
/// appears with its first count has no rate before its second.
pub fn describe() {
    for metric in ALL.iter().filter(|metric| metric.name != FAULT_DURATION) {
        let unit = match metric.unit {
            "seconds" => Unit::Seconds,
            "bytes" => Unit::Bytes,
            _ => Unit::Count,
        };
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, unit, metric.meaning),
            Kind::Gauge => metrics::describe_gauge!(metric.name, unit, metric.meaning),
            Kind::Histogram => metrics::describe_histogram!(metric.name, unit, metric.meaning),
        }
        if metric.labels.is_empty() {
            match metric.kind {
                Kind::Counter => drop(metrics::counter!(metric.name)),
                Kind::Histogram => drop(metrics::histogram!(metric.name)),
                Kind::Gauge => {}
            }
        }
    }
    let closed = [
        ("rethaw_identity_total", "outcome", &["proven", "failed"][..]),
        ("rethaw_vms_recovered_total", "outcome", &["serving", "lost"]),
        ("rethaw_builds_total", "outcome", &["built", "cached", "failed"]),
        ("rethaw_net_names_total", "outcome", &["answered", "refused", "failed"]),
        ("rethaw_sandboxes_gone_total", "reason", &["deleted", "expired", "vm_died", "shutdown"]),
    ];
    for (name, label, values) in closed {
        for value in values {
            drop(metrics::counter!(name, label => *value));
        }
    }
}

/// One metric's meaning.
pub fn meaning(name: &str) -> &'static str {
    ALL.iter().find(|metric| metric.name == name).map_or("", |metric| metric.meaning)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// The rows of the table in the documentation, as this list says they should be.
    fn table() -> String {
        let row = |metric: &Metric| {
            let labels: Vec<String> = metric.labels.iter().map(|l| format!("`{l}`")).collect();
            let kind = format!("{:?}", metric.kind).to_lowercase();
            format!(
                "| `{}` | {kind} | {} | {} | {} |\n",
                metric.name,
                metric.unit,
                labels.join(" "),
                metric.meaning
            )
        };
        ALL.iter().map(row).collect()
    }

    #[test]
    fn the_documentation_has_this_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
        let text = std::fs::read_to_string(path).unwrap();
        let rows: String = text
            .lines()
            .filter(|line| line.starts_with("| `rethaw_"))
            .map(|line| format!("{line}\n"))
            .collect();
        assert!(rows == table(), "docs/operations.md should have these rows:\n{}", table());
    }

    /// Names in the sources, found as text: what is counted somewhere must be explained here.
    #[test]
    fn every_metric_in_the_sources_is_listed() {
        let mut named = BTreeSet::from([FAULT_DURATION.to_owned()]);
        let mut dirs = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path);
                } else if path.extension().is_some_and(|e| e == "rs")
                    && !path.ends_with("catalogue.rs")
                {
                    let text = std::fs::read_to_string(path).unwrap();
                    let quoted = text.split('"').filter(|part| {
                        part.starts_with("rethaw_")
                            && part.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
                    });
                    named.extend(quoted.map(str::to_owned));
                }
            }
        }
        let listed: BTreeSet<String> = ALL.iter().map(|metric| metric.name.to_owned()).collect();
        assert_eq!(listed.len(), ALL.len(), "a name twice");
        assert_eq!(named, listed);
    }

    #[test]
    fn names_say_what_they_are() {
        for metric in ALL {
            let name = metric.name;
            assert_eq!(metric.kind == Kind::Counter, name.ends_with("_total"), "{name}");
            assert!(
                metric.kind != Kind::Histogram || name.ends_with("_duration_seconds"),
                "{name}"
            );
            if metric.unit == "bytes" {
                assert!(name.trim_end_matches("_total").ends_with("_bytes"), "{name}");
            }
            assert!(!metric.meaning.is_empty() && !metric.labels.contains(&"id"), "{name}");
        }
    }
}
