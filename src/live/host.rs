//! How the host is doing, from `/proc`.

use std::path::{Path, PathBuf};

use serde::Serialize;
use utoipa::ToSchema;

/// The host at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
#[schema(as = LiveHost)]
pub struct HostNow {
    /// Part of all CPU time since the moment before that was not idle, 0 to 100.
    pub cpu_percent: f64,
    /// Load average of the last minute.
    pub load_1m: f64,
    /// Memory that is not available to new programs.
    pub memory_used_bytes: u64,
    /// All of it.
    pub memory_total_bytes: u64,
    /// Used of the file system the service's directory is on.
    pub disk_used_bytes: u64,
    /// What can be used of it, used or not; as `df` counts, without what is kept back for root.
    pub disk_total_bytes: u64,
}

/// Looks at the host again and again.
#[derive(Debug)]
pub struct HostProbe {
    home: PathBuf,
    before: CpuTimes,
}

impl HostProbe {
    /// For a service that keeps its files in `home`.
    pub fn new(home: &Path) -> Self {
        Self { home: home.to_owned(), before: read("/proc/stat", cpu_times) }
    }

    /// The host now; what cannot be read is 0.
    pub fn look(&mut self) -> HostNow {
        let now = read("/proc/stat", cpu_times);
        let before = std::mem::replace(&mut self.before, now);
        let (memory_total_bytes, available) = read("/proc/meminfo", memory);
        let (disk_total_bytes, disk_used_bytes) = disk(&self.home).unwrap_or_default();
        HostNow {
            cpu_percent: now.busy_percent_since(before),
            load_1m: read("/proc/loadavg", |text| text.split(' ').next()?.parse().ok()),
            memory_used_bytes: memory_total_bytes.saturating_sub(available),
            memory_total_bytes,
            disk_used_bytes,
            disk_total_bytes,
        }
    }
}

/// CPUs this process may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn read<T: Default>(path: &str, parse: impl FnOnce(&str) -> Option<T>) -> T {
    std::fs::read_to_string(path).ok().and_then(|text| parse(&text)).unwrap_or_default()
}

/// Clock ticks since boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CpuTimes {
    total: u64,
    idle: u64,
}

impl CpuTimes {
    fn busy_percent_since(self, before: Self) -> f64 {
        let total = self.total.saturating_sub(before.total);
        if total == 0 {
            return 0.0;
        }
        let idle = self.idle.saturating_sub(before.idle).min(total);
        let percent = 100.0 * (total - idle) as f64 / total as f64;
        (percent * 10.0).round() / 10.0
    }
}

/// The first line of `/proc/stat`. Guest time, columns nine and ten, is part of user time already.
fn cpu_times(text: &str) -> Option<CpuTimes> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line.split_whitespace().take(8).map_while(|n| n.parse().ok()).collect();
    let idle = ticks.get(3)? + ticks.get(4).unwrap_or(&0);
    Some(CpuTimes { total: ticks.iter().sum(), idle })
}

/// Bytes in all, bytes available.
fn memory(text: &str) -> Option<(u64, u64)> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?))
}

/// Bytes that can be used, bytes that are.
fn disk(path: &Path) -> Option<(u64, u64)> {
    let stat = rustix::fs::statvfs(path).ok()?;
    let used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize;
    Some((used + stat.f_bavail * stat.f_frsize, used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_a_difference() {
        let at = |text| cpu_times(text).unwrap();
        let before = at("cpu  100 0 100 700 100 0 0 0 50 0\ncpu0 1 2 3");
        let after = at("cpu  160 0 120 800 120 0 0 0 80 0\n");
        assert_eq!(before, CpuTimes { total: 1000, idle: 800 });
        assert_eq!(after.busy_percent_since(before), 40.0);
        assert_eq!(after.busy_percent_since(after), 0.0);
        assert_eq!(before.busy_percent_since(after), 0.0, "a counter that went back is no panic");
        assert_eq!(cpu_times("intr 1"), None);
    }

    #[test]
    fn memory_is_what_programs_could_have() {
        let text = "MemTotal:       16 kB\nMemFree:  1 kB\nMemAvailable:    4 kB\n";
        assert_eq!(memory(text), Some((16 << 10, 4 << 10)));
        assert_eq!(memory("MemTotal: x kB"), None);
    }

    #[test]
    fn this_host_is_seen() {
        let now = HostProbe::new(Path::new("/")).look();
        assert!(now.memory_total_bytes > now.memory_used_bytes && now.memory_used_bytes > 0);
        assert!(now.disk_total_bytes >= now.disk_used_bytes && now.disk_total_bytes > 0);
        assert!((0.0..=100.0).contains(&now.cpu_percent));
    }
}
