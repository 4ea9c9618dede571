//! Times and sizes as people read and write them; JSON keeps seconds and bytes.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// `850ms`, `42s`, `7m45s`, `3h12m`, `2d4h`.
pub fn duration(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0 => format!("{}ms", span.as_millis()),
        1..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// `512 B`, `12.3 MB`: powers of a thousand, as on the label of a disk.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if count < 1000 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1000.0;
    let mut unit = 0;
    // 999.95 would be shown as 1000.0 of the smaller unit.
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Milliseconds with as many digits as are worth reading.
pub fn millis(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.1} s", ms / 1000.0),
    }
}

/// How long ago `rfc3339` was, as text; the text itself when it is no time.
pub fn since(rfc3339: &str, now: OffsetDateTime) -> String {
    match OffsetDateTime::parse(rfc3339, &Rfc3339) {
        Ok(then) => duration((now - then).try_into().unwrap_or_default()),
        Err(_) => rfc3339.to_owned(),
    }
}

/// How long it is until `rfc3339`; `now` when it has passed.
pub fn until(rfc3339: &str, now: OffsetDateTime) -> String {
    match OffsetDateTime::parse(rfc3339, &Rfc3339) {
        Ok(then) if then > now => duration((then - now).try_into().unwrap_or_default()),
        Ok(_) => "now".to_owned(),
        Err(_) => rfc3339.to_owned(),
    }
}

/// Parses `90`, `90s`, `1.5m`, `2h`, `1d`; a bare number is seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return Err(format!("{unit:?} is not a unit of time: ms, s, m, h or d")),
    };
    let number: f64 = number.parse().map_err(|_| "write it as 90, 90s, 5m or 2h".to_owned())?;
    Duration::try_from_secs_f64(number * factor)
        .ok()
        .filter(|span| !span.is_zero())
        .ok_or_else(|| "it must be above zero and not astronomical".to_owned())
}

/// A time for an API field that takes whole seconds.
pub fn whole_seconds(span: Duration) -> u64 {
    span.as_secs() + u64::from(span.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_read_well() {
        for (ms, text) in [
            (850, "850ms"),
            (42_000, "42s"),
            (465_000, "7m45s"),
            (11_520_000, "3h12m"),
            (187_200_000, "2d4h"),
        ] {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn sizes_read_well() {
        for (count, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (12_345_678, "12.3 MB"),
            (999_999, "1.0 MB"),
            (u64::MAX, "18.4 EB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn times_are_relative_to_now() {
        let now = OffsetDateTime::parse("2026-01-01T00:10:00Z", &Rfc3339).unwrap();
        assert_eq!(since("2026-01-01T00:02:15Z", now), "7m45s");
        assert_eq!(until("2026-01-01T00:15:00Z", now), "5m0s");
        assert_eq!(until("2026-01-01T00:05:00Z", now), "now");
        assert_eq!(since("2026-01-01T00:11:00Z", now), "0ms", "a clock that is ahead is no panic");
        assert_eq!(since("soon", now), "soon");
    }

    #[test]
    fn spans_are_parsed() {
        let ok = |text: &str| parse_duration(text).unwrap();
        assert_eq!(ok("90"), Duration::from_secs(90));
        assert_eq!(ok("1.5m"), Duration::from_secs(90));
        assert_eq!(ok("250ms"), Duration::from_millis(250));
        assert_eq!(ok("2h"), Duration::from_secs(7200));
        for text in ["", "0", "-1", "5w", "m", "1e9", "1.2.3", "99999999999999999999999"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert_eq!(whole_seconds(Duration::from_millis(1500)), 2);
    }
}
