//! The picture: a head line, pools, latencies, sandboxes.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Deserialize;
use time::OffsetDateTime;

use crate::cli::human;
use crate::cli::table::Table;

/// Points in a line of little bars: the last minute.
const BARS: usize = 30;
/// Cells of a pool's bar.
const CELLS: u32 = 24;

/// How it is to look.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Columns and rows, on a terminal.
    screen: Option<(usize, usize)>,
}

impl Style {
    /// For a pipe or a file: everything, no control characters.
    pub fn plain() -> Self {
        Self { screen: None }
    }

    /// For a terminal: what fits.
    pub fn screen(cols: u16, rows: u16) -> Self {
        Self { screen: Some((cols.into(), rows.into())) }
    }
}

/// What of `GET /v1/stats` is shown.
#[derive(Debug, Deserialize)]
pub struct Stats {
    service: Service,
    pools: Vec<Pool>,
    sandboxes: Sandboxes,
    history: History,
}

#[derive(Debug, Deserialize)]
struct Service {
    version: String,
    vmm: String,
    cpus: u32,
    started_at: String,
}

#[derive(Debug, Deserialize)]
struct Pool {
    template: String,
    target: u32,
    ready: u32,
    restoring: u32,
    claimed: u32,
    misses_total: u64,
}

#[derive(Debug, Deserialize)]
struct Sandboxes {
    total: usize,
    by_state: BTreeMap<String, u32>,
    items: Vec<Sandbox>,
}

#[derive(Debug, Deserialize)]
struct Sandbox {
    id: String,
    name: Option<String>,
    template: String,
    state: String,
    origin: String,
    created_at: String,
    expires_at: String,
    total_ms: Option<f64>,
    page_faults: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct History {
    interval_seconds: f64,
    points: Vec<Point>,
}

#[derive(Debug, Deserialize)]
struct Point {
    claims_warm: Summary,
    claims_cold: Summary,
    restores: Summary,
    faults: Faults,
    host: Host,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Summary {
    count: u64,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct Faults {
    per_second: f64,
    p99_micros: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Host {
    cpu_percent: f64,
    load_1m: f64,
    memory_used_bytes: u64,
    memory_total_bytes: u64,
    disk_used_bytes: u64,
    disk_total_bytes: u64,
}

/// The whole picture.
pub fn render(stats: &Stats, now: OffsetDateTime, style: Style) -> String {
    let mut text = head(stats, now);
    let _ = write!(text, "\n{}", pools(&stats.pools));
    let _ = write!(text, "\n{}", latencies(&stats.history));
    let states = stats.sandboxes.by_state.iter().map(|(state, n)| format!("{n} {state}"));
    let states = states.collect::<Vec<_>>().join(", ");
    let title = if states.is_empty() { "no sandbox".to_owned() } else { states };
    let _ = writeln!(text, "\nSANDBOXES: {title}");
    let used = text.lines().count();
    // One row for the header, one for what is left out.
    let fit = style.screen.map(|(_, rows)| rows.saturating_sub(used + 2));
    text.push_str(&sandboxes(&stats.sandboxes, now, fit));
    match style.screen {
        Some((cols, _)) => on_screen(&text, cols),
        None => text,
    }
}

fn head(stats: &Stats, now: OffsetDateTime) -> String {
    let Service { version, vmm, cpus, started_at } = &stats.service;
    let mut text = format!("rethaw {version} · {vmm} · up {}", human::since(started_at, now));
    if let Some(Point { host, .. }) = stats.history.points.last() {
        let _ = write!(
            text,
            " · CPU {:.0} % of {cpus} · load {:.2} · memory {} of {} · disk {} of {}",
            host.cpu_percent,
            host.load_1m,
            human::bytes(host.memory_used_bytes),
            human::bytes(host.memory_total_bytes),
            human::bytes(host.disk_used_bytes),
            human::bytes(host.disk_total_bytes),
        );
    }
    text.push('\n');
    text
}

fn pools(pools: &[Pool]) -> String {
    let mut table =
        Table::new(&["POOL", "READY", "TARGET", "RESTORING", "CLAIMED", "MISSES", "PARKED"]);
    for pool in pools {
        table.row(vec![
            pool.template.clone(),
            pool.ready.to_string(),
            pool.target.to_string(),
            pool.restoring.to_string(),
            pool.claimed.to_string(),
            pool.misses_total.to_string(),
            cells(pool),
        ]);
    }
    table.to_string()
}

/// A cell for every VM that should wait: there, on its way, missing.
fn cells(pool: &Pool) -> String {
    let all = pool.target.max(pool.ready + pool.restoring);
    let scale = |n: u32| if all > CELLS { n * CELLS / all } else { n } as usize;
    let (ready, coming) = (scale(pool.ready), scale(pool.ready + pool.restoring));
    let all = scale(all);
    "█".repeat(ready) + &"▒".repeat(coming - ready) + &"·".repeat(all - coming)
}

fn latencies(history: &History) -> String {
    let points = &history.points;
    let minutes = (points.len() as f64 * history.interval_seconds / 60.0).ceil();
    let mut table = Table::new(&["LATENCY", "P50", "P99", "COUNT", "LAST MINUTE"]);
    let mut row = |name: &str, pick: fn(&Point) -> Summary| {
        let last = points.iter().rev().map(pick).find(|summary| summary.count > 0);
        let ms = |value: Option<f64>| value.map(human::millis).unwrap_or_default();
        table.row(vec![
            name.to_owned(),
            ms(last.and_then(|summary| summary.p50_ms)),
            ms(last.and_then(|summary| summary.p99_ms)),
            points.iter().map(|point| pick(point).count).sum::<u64>().to_string(),
            bars(points.iter().map(|point| pick(point).p50_ms)),
        ]);
    };
    row("claim, warm", |point| point.claims_warm);
    row("claim, cold", |point| point.claims_cold);
    row("restore", |point| point.restores);
    let faults = points.last().map_or(0.0, |point| point.faults.per_second);
    let p99 = points.iter().rev().find_map(|point| point.faults.p99_micros);
    table.row(vec![
        "page fault".to_owned(),
        String::new(),
        p99.map(|us| format!("≤ {}", human::millis(us as f64 / 1e3))).unwrap_or_default(),
        format!("{faults:.0}/s"),
        bars(points.iter().map(|point| Some(point.faults.per_second))),
    ]);
    format!(
        "{table}counts are of the last {minutes:.0} min; p50 and p99 of the newest interval with any\n"
    )
}

/// The newest values as little bars; an interval without one is a blank.
fn bars(values: impl DoubleEndedIterator<Item = Option<f64>>) -> String {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let mut newest: Vec<Option<f64>> = values.rev().take(BARS).collect();
    newest.reverse();
    let top = newest.iter().flatten().copied().fold(0.0, f64::max);
    let level = |value: f64| {
        let part = if top > 0.0 { value / top } else { 0.0 };
        LEVELS[((part * 8.0).ceil() as usize).clamp(1, 8) - 1]
    };
    let text: String = newest.iter().map(|value| value.map_or(' ', level)).collect();
    if text.trim().is_empty() { String::new() } else { text }
}

fn sandboxes(sandboxes: &Sandboxes, now: OffsetDateTime, fit: Option<usize>) -> String {
    if sandboxes.items.is_empty() {
        return String::new();
    }
    let shown = fit.unwrap_or(usize::MAX).min(sandboxes.items.len());
    let header = ["ID", "NAME", "TEMPLATE", "STATE", "ORIGIN", "TOOK", "FAULTS", "AGE", "EXPIRES"];
    let mut table = Table::new(&header);
    for one in &sandboxes.items[..shown] {
        let expires = match one.state.as_str() {
            "paused" => String::new(),
            _ => human::until(&one.expires_at, now),
        };
        table.row(vec![
            one.id.clone(),
            one.name.clone().unwrap_or_default(),
            one.template.clone(),
            one.state.clone(),
            one.origin.clone(),
            one.total_ms.map(human::millis).unwrap_or_default(),
            one.page_faults.map(|faults| faults.to_string()).unwrap_or_default(),
            human::since(&one.created_at, now),
            expires,
        ]);
    }
    let mut text = table.to_string();
    if sandboxes.total > shown {
        let _ = writeln!(text, "and {} more", sandboxes.total - shown);
    }
    text
}

/// Cuts lines to the width and makes headings stand out.
fn on_screen(text: &str, cols: usize) -> String {
    let mut out = String::with_capacity(text.len() + 256);
    for (at, line) in text.lines().enumerate() {
        let cut: String = line.chars().take(cols).collect();
        let heading = at == 0 || line.split(['\u{20}', ':']).next().is_some_and(is_heading);
        if heading {
            let _ = writeln!(out, "\x1b[1m{cut}\x1b[0m");
        } else {
            let _ = writeln!(out, "{cut}");
        }
    }
    out
}

fn is_heading(word: &str) -> bool {
    word.len() > 1 && word.bytes().all(|byte| byte.is_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::format_description::well_known::Rfc3339;

    use super::*;

    fn stats() -> Stats {
        let none = json!({ "count": 0, "p50_ms": null, "p99_ms": null });
        let host = json!({
            "cpu_percent": 34.4, "load_1m": 1.2, "memory_used_bytes": 3_000_000_000_u64,
            "memory_total_bytes": 24_000_000_000_u64, "disk_used_bytes": 10, "disk_total_bytes": 20,
        });
        let point = |warm: &serde_json::Value| {
            json!({
                "claims_warm": warm, "claims_cold": none, "restores": none, "host": host,
                "faults": { "per_second": 120.0, "p99_micros": 64 },
            })
        };
        let items: Vec<_> = (0..9)
            .map(|n| {
                json!({
                    "id": format!("{n:020}"), "name": null, "template": "base", "state": "running",
                    "origin": "warm", "created_at": "2026-01-01T00:00:00Z",
                    "expires_at": "2026-01-01T00:05:00Z", "total_ms": 1.5, "page_faults": 12,
                })
            })
            .collect();
        let stats = json!({
            "service": { "version": "1.2.3", "vmm": "qemu", "cpus": 2, "started_at": "2026-01-01T00:00:00Z" },
            "pools": [{ "template": "base", "target": 4, "ready": 2, "restoring": 1, "claimed": 9, "misses_total": 7 }],
            "sandboxes": { "total": 12, "by_state": { "paused": 3, "running": 9 }, "items": items },
            "history": {
                "interval_seconds": 2.0,
                "points": [point(&json!({ "count": 5, "p50_ms": 1.25, "p99_ms": 3.0 })), point(&none)],
            },
        });
        serde_json::from_value(stats).unwrap()
    }

    fn now() -> OffsetDateTime {
        OffsetDateTime::parse("2026-01-01T00:01:05Z", &Rfc3339).unwrap()
    }

    #[test]
    fn the_picture_has_everything() {
        let text = render(&stats(), now(), Style::plain());
        assert!(text.starts_with("rethaw 1.2.3 · qemu · up 1m5s · CPU 34 % of 2 · load 1.20"));
        for part in [
            "base   2       4        1           9         7        ██▒·",
            "claim, warm   1.25 ms   3.00 ms",
            "SANDBOXES: 3 paused, 9 running",
            "00000000000000000008",
            "1.50 ms   12       1m5s   3m55s",
            "and 3 more",
            "≤ 0.06 ms",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn a_small_screen_shows_what_fits() {
        let text = render(&stats(), now(), Style::screen(40, 20));
        assert!(text.lines().count() <= 20, "{text}");
        assert!(text.lines().last().unwrap().starts_with("and "), "{text}");
        for line in text.lines() {
            let line = line.replace("\x1b[1m", "").replace("\x1b[0m", "");
            assert!(line.chars().count() <= 40, "{line}");
        }
        // Smaller than anything useful is no panic.
        render(&stats(), now(), Style::screen(1, 1));
    }

    #[test]
    fn bars_are_relative_and_blanks_are_kept() {
        assert_eq!(bars([Some(1.0), None, Some(8.0)].into_iter()), "▁ █");
        assert_eq!(bars([None, None].into_iter()), "");
        assert_eq!(bars([Some(0.0)].into_iter()), "▁");
    }
}
