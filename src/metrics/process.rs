//! The service process itself, under the names that every Prometheus client uses for it.

use std::fmt::Write;

use nix::unistd::{SysconfVar, sysconf};
use rustix::process::{Resource, getrlimit};

/// What `/proc/self/stat` says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Stat {
    /// User and kernel time, in ticks.
    cpu_ticks: u64,
    threads: u64,
    /// Ticks from the boot of the host to the start of the process.
    start_ticks: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

/// All of `process_*` as Prometheus text; what cannot be read is left out. By hand, because the
/// recorder's counters are whole numbers and CPU time is not.
pub fn text() -> String {
    let mut text = String::new();
    let mut put = |name: &str, kind: &str, help: &str, value: f64| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    };
    let read = |path| std::fs::read_to_string(path).ok();
    let ticks = system(SysconfVar::CLK_TCK, 100);
    if let Some(stat) = read("/proc/self/stat").and_then(|text| parse(&text)) {
        let cpu = stat.cpu_ticks as f64 / ticks;
        put("process_cpu_seconds_total", "counter", "CPU time", cpu);
        let resident = stat.resident_pages as f64 * system(SysconfVar::PAGE_SIZE, 4096);
        put("process_resident_memory_bytes", "gauge", "Memory in use", resident);
        let space = stat.virtual_bytes as f64;
        put("process_virtual_memory_bytes", "gauge", "Address space", space);
        put("process_threads", "gauge", "Threads", stat.threads as f64);
        if let Some(booted) = read("/proc/stat").and_then(|text| boot_time(&text)) {
            let start = booted as f64 + stat.start_ticks as f64 / ticks;
            put("process_start_time_seconds", "gauge", "Start, in Unix time", start);
        }
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        put("process_open_fds", "gauge", "Open files", open.count() as f64);
    }
    if let Some(limit) = getrlimit(Resource::Nofile).current {
        put("process_max_fds", "gauge", "Most files that may be open", limit as f64);
    }
    text
}

fn system(name: SysconfVar, usual: u32) -> f64 {
    sysconf(name).ok().flatten().map_or(f64::from(usual), |value| value as f64)
}

fn parse(text: &str) -> Option<Stat> {
    // The name in brackets may hold anything, brackets among it.
    let (_, rest) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // As numbered in proc(5), where the state, first here, is the third.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(Stat {
        cpu_ticks: field(14)? + field(15)?,
        threads: field(20)?,
        start_ticks: field(22)?,
        virtual_bytes: field(23)?,
        resident_pages: field(24)?,
    })
}

fn boot_time(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_is_no_trouble() {
        let text = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 30 12 13 14 15 16 9 18 5000 20480 25 99 0";
        let stat = parse(text).unwrap();
        let wanted = Stat {
            cpu_ticks: 42,
            threads: 9,
            start_ticks: 5000,
            virtual_bytes: 20480,
            resident_pages: 25,
        };
        assert_eq!(stat, wanted);
        assert_eq!(parse("7 (x) S 1"), None);
    }

    #[test]
    fn this_process_is_seen() {
        let text = text();
        assert_eq!(text.matches("# TYPE process_").count(), 7, "{text}");
        assert!(!text.contains("_bytes 0\n"), "{text}");
    }
}
