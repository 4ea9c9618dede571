//! What the machine uses: `GET /usage`, from `/proc` and the root file system.

use crate::agent::Agent;
use crate::server::ApiError;
use crate::wire::Usage;
use std::fs;
use std::path::Path;

/// The processors' time since boot, in ticks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuTimes {
    busy: u64,
    all: u64,
}

impl CpuTimes {
    /// From the first line of `/proc/stat`: user, nice, system, idle, iowait, irq, softirq, steal.
    /// Guest time is a part of user time.
    fn parse(stat: &str) -> Option<Self> {
        let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_ascii_whitespace();
        let ticks: Vec<u64> = fields.take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
        let all = ticks.iter().sum();
        let idle = ticks.get(3)? + ticks.get(4)?;
        Some(Self { busy: all - idle, all })
    }

    /// Busy share in percent since an earlier moment.
    fn percent_since(self, before: Self) -> f64 {
        let all = self.all.saturating_sub(before.all);
        if all == 0 {
            return 0.0;
        }
        100.0 * self.busy.saturating_sub(before.busy) as f64 / all as f64
    }
}

/// A line of `/proc/meminfo`, in bytes.
fn meminfo(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kibibytes = line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

/// `GET /usage`.
///
/// # Errors
/// `/proc` cannot be read.
pub fn usage(agent: &Agent) -> Result<Usage, ApiError> {
    let times = CpuTimes::parse(&fs::read_to_string("/proc/stat")?)
        .ok_or_else(|| ApiError::internal("/proc/stat is not as expected"))?;
    let percent = times.percent_since(agent.cpu_times.replace(times));
    let memory = fs::read_to_string("/proc/meminfo")?;
    let total = meminfo(&memory, "MemTotal");
    let disk = nix::sys::statvfs::statvfs(Path::new("/")).map_err(std::io::Error::from)?;
    let (block, blocks) = (disk.fragment_size(), disk.blocks());
    Ok(Usage {
        cpu_count: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        cpu_used_percent: (percent * 100.0).round() / 100.0,
        memory_bytes: total,
        memory_used_bytes: total.saturating_sub(meminfo(&memory, "MemAvailable")),
        memory_cache_bytes: meminfo(&memory, "Cached"),
        disk_bytes: blocks * block,
        disk_used_bytes: (blocks - disk.blocks_free()) * block,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_counted_between_two_looks() {
        let first = CpuTimes::parse("cpu  10 0 10 70 10 0 0 0 5 0\ncpu0 ...\n").unwrap();
        assert_eq!(first, CpuTimes { busy: 20, all: 100 });
        let then = CpuTimes::parse("cpu  40 0 30 100 30 0 0 0 5 0\n").unwrap();
        assert!((then.percent_since(first) - 50.0).abs() < 1e-9);
        assert!(first.percent_since(first).abs() < 1e-9);
        assert_eq!(CpuTimes::parse("intr 1 2 3"), None);
    }

    #[test]
    fn memory_lines_are_kibibytes() {
        let text = "MemTotal:  2048 kB\nMemFree: 12 kB\nCached:    7 kB\n";
        assert_eq!(meminfo(text, "MemTotal"), 2 << 20);
        assert_eq!(meminfo(text, "Cached"), 7 << 10);
        assert_eq!(meminfo(text, "Nothing"), 0);
    }
}
