//! Which Firecracker versions are supported, and since which one each API field exists.
//!
//! Firecracker refuses a request that has a field it does not know, so a field is sent only to a
//! version that has it, and asking for one that the running version lacks is an error here, with
//! the reason, before anything was sent.

use std::fmt;
use std::str::FromStr;

/// A Firecracker release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Major.
    pub major: u16,
    /// Minor.
    pub minor: u16,
    /// Patch.
    pub patch: u16,
}

impl Version {
    /// `major.minor.patch`.
    pub const fn new(major: u16, minor: u16, patch: u16) -> Self {
        Self { major, minor, patch }
    }

    /// Whether this version may be driven, or why not.
    pub fn check_supported(self) -> Result<(), UnsupportedVersion> {
        let refuse = |reason| Err(UnsupportedVersion { version: self, reason });
        if self == Self::new(1, 12, 1) || self >= Self::new(1, 16, 1) && self.major == 1 {
            return Ok(());
        }
        if self.major != 1 {
            return refuse("its API is not the one this driver speaks");
        }
        if self == Self::new(1, 16, 0) {
            return refuse("the vsock of a restored guest can hang for ever (fixed in 1.16.1)");
        }
        if self < Self::new(1, 12, 1) {
            return refuse(
                "it lets go of the page server's socket at once or cannot override the tap, and \
                 both are relied on (1.12.1 does not)",
            );
        }
        refuse("between 1.12.1 and 1.16.1 restored guests lose their clock, network or vsock")
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// The text is no version.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a version like 1.12.1")]
pub struct NotAVersion(String);

impl FromStr for Version {
    type Err = NotAVersion;

    /// Reads `1.12.1`, `v1.12.1` and development versions such as `1.17.0-dev`.
    fn from_str(text: &str) -> Result<Self, NotAVersion> {
        let err = || NotAVersion(text.to_owned());
        let plain = text.trim().trim_start_matches('v');
        let plain = plain.split(['-', '+']).next().unwrap_or(plain);
        let mut parts = plain.split('.').map(|p| p.parse::<u16>().map_err(|_| err()));
        let mut next = || parts.next().unwrap_or_else(|| Err(err()));
        let version = Self::new(next()?, next()?, next()?);
        if parts.next().is_some() { Err(err()) } else { Ok(version) }
    }
}

/// A version this driver refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Firecracker {version} is not supported: {reason}; use 1.12.1, or 1.16.1 or later")]
pub struct UnsupportedVersion {
    /// The version.
    pub version: Version,
    /// Why.
    pub reason: &'static str,
}

/// API fields that not every supported version has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// `network_overrides` of `PUT /snapshot/load`.
    NetworkOverrides,
    /// `track_dirty_pages` of `PUT /snapshot/load`; before it the field was
    /// `enable_diff_snapshots`.
    LoadTrackDirtyPages,
    /// `clock_realtime` of `PUT /snapshot/load`.
    ClockRealtime,
    /// `vsock_override` of `PUT /snapshot/load`.
    VsockOverride,
    /// `huge_pages` of `PUT /snapshot/load`.
    LoadHugePages,
    /// `huge_pages` of `PUT /machine-config`.
    HugePages,
}

impl Field {
    /// Its name in requests.
    pub fn name(self) -> &'static str {
        match self {
            Self::NetworkOverrides => "network_overrides",
            Self::LoadTrackDirtyPages => "track_dirty_pages",
            Self::ClockRealtime => "clock_realtime",
            Self::VsockOverride => "vsock_override",
            Self::LoadHugePages | Self::HugePages => "huge_pages",
        }
    }

    /// The first version that has it, then versions of older series it was brought back to.
    fn since(self) -> (Version, &'static [Version]) {
        const CLOCK: &[Version] = &[Version::new(1, 15, 1), Version::new(1, 14, 4)];
        match self {
            Self::NetworkOverrides => (Version::new(1, 12, 0), &[]),
            Self::LoadTrackDirtyPages => (Version::new(1, 13, 0), &[]),
            Self::ClockRealtime => (Version::new(1, 16, 0), CLOCK),
            Self::VsockOverride => (Version::new(1, 16, 0), &[]),
            Self::LoadHugePages => (Version::new(1, 17, 0), &[]),
            Self::HugePages => (Version::new(1, 7, 0), &[]),
        }
    }

    /// Whether `version` knows this field.
    pub fn known_to(self, version: Version) -> bool {
        let (since, backports) = self.since();
        let backported = |b: &Version| {
            (b.major, b.minor) == (version.major, version.minor) && version.patch >= b.patch
        };
        version >= since || backports.iter().any(backported)
    }

    /// An error unless `version` knows this field.
    pub fn require(self, version: Version) -> Result<(), UnsupportedField> {
        if self.known_to(version) {
            return Ok(());
        }
        Err(UnsupportedField { field: self.name(), version, since: self.since().0 })
    }
}

/// A field that the running version does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Firecracker {version} has no field {field}, it came with {since}")]
pub struct UnsupportedField {
    /// The field.
    pub field: &'static str,
    /// The running version.
    pub version: Version,
    /// The first that has it.
    pub since: Version,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v(text: &str) -> Version {
        text.parse().unwrap()
    }

    #[test]
    fn reads_versions_as_firecracker_prints_them() {
        assert_eq!(v("1.12.1"), Version::new(1, 12, 1));
        assert_eq!(v("v1.16.1\n"), Version::new(1, 16, 1));
        assert_eq!(v("1.17.0-dev"), Version::new(1, 17, 0));
        for bad in ["", "1", "1.12", "1.12.1.4", "a.b.c", "1.-2.3"] {
            assert!(bad.parse::<Version>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn refuses_what_it_cannot_stand_for() {
        for good in ["1.12.1", "1.16.1", "1.16.2", "1.17.0"] {
            assert_eq!(v(good).check_supported(), Ok(()), "{good}");
        }
        for bad in ["1.11.0", "1.12.0", "1.13.1", "1.15.1", "1.16.0", "2.0.0", "0.25.0"] {
            let e = v(bad).check_supported().unwrap_err();
            assert!(e.to_string().contains(bad), "{e}");
        }
        let e = v("1.16.0").check_supported().unwrap_err().to_string();
        assert!(e.contains("vsock") && e.contains("1.16.1"), "{e}");
    }

    #[test]
    fn fields_appear_in_the_releases_that_have_them() {
        let has = |f: Field, text| f.known_to(v(text));
        assert!(has(Field::NetworkOverrides, "1.12.1"));
        assert!(!has(Field::LoadTrackDirtyPages, "1.12.1"));
        assert!(has(Field::LoadTrackDirtyPages, "1.16.1"));
        assert!(!has(Field::ClockRealtime, "1.15.0") && has(Field::ClockRealtime, "1.15.1"));
        assert!(!has(Field::ClockRealtime, "1.14.3") && has(Field::ClockRealtime, "1.14.4"));
        assert!(!has(Field::ClockRealtime, "1.12.1") && has(Field::ClockRealtime, "1.16.1"));
        assert!(!has(Field::VsockOverride, "1.15.1") && has(Field::VsockOverride, "1.16.1"));
        assert!(!has(Field::LoadHugePages, "1.16.1") && has(Field::LoadHugePages, "1.17.0"));
        let e = Field::VsockOverride.require(v("1.12.1")).unwrap_err().to_string();
        assert_eq!(e, "Firecracker 1.12.1 has no field vsock_override, it came with 1.16.0");
    }
}
