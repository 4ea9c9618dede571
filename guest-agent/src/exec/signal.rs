//! Signals by name.

use nix::sys::signal::Signal;

/// `SIGKILL` for 9; `SIG34` for a real-time one.
pub fn name(number: i32) -> String {
    Signal::try_from(number).map_or_else(|_| format!("SIG{number}"), |s| s.as_str().to_owned())
}

/// The signal of a name, with or without `SIG`, or of a number.
pub fn parse(name: &str) -> Option<Signal> {
    if let Ok(number) = name.parse::<i32>() {
        return Signal::try_from(number).ok();
    }
    name.parse().ok().or_else(|| format!("SIG{name}").parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        assert_eq!(name(9), "SIGKILL");
        assert_eq!(name(40), "SIG40");
        assert_eq!(parse("SIGTERM"), Some(Signal::SIGTERM));
        assert_eq!(parse("TERM"), Some(Signal::SIGTERM));
        assert_eq!(parse("15"), Some(Signal::SIGTERM));
        assert_eq!(parse("SIGNOPE"), None);
        assert_eq!(parse("0"), None);
    }
}
