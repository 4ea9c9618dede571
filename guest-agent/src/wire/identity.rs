//! The identity request and its report, and the proof a host may draw from the report.

use super::Base64;
use crate::identity::Verified;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Every item, in the order they are applied in.
pub const ITEMS: &[&str] = &[
    "entropy",
    "clock",
    "network",
    "sockets",
    "hostname",
    "machine_id",
    "boot_id",
    "journald",
    "random_seed",
    "ssh_host_keys",
    "token",
    "generation",
    "hooks",
    "thaw",
];

/// Items a report must hold, verified, before anybody may use the VM.
pub const REQUIRED_ITEMS: &[&str] =
    &["entropy", "clock", "hostname", "machine_id", "boot_id", "random_seed", "generation", "thaw"];

/// Body of `POST /identity`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct IdentityRequest {
    /// Unique name of this identity, a UUID.
    pub generation: String,
    /// 64 fresh random bytes.
    pub entropy: Base64,
    /// The host's clock when this was sent, nanoseconds since 1970.
    pub wall_clock_unix_nanos: u64,
    /// Network interface the addresses below belong to; `eth0` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Hardware address, `02:xx:xx:xx:xx:xx`. The network is left alone when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// IPv4 address and gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Config>,
    /// IPv6 address and gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Config>,
    /// Name servers, written to `/etc/resolv.conf`; left alone when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<String>,
    /// Host name.
    pub hostname: String,
    /// `/etc/machine-id`: 32 lower-case hex digits.
    pub machine_id: String,
    /// What `/proc/sys/kernel/random/boot_id` shows: a UUID.
    pub boot_id: String,
    /// Token the sandbox's user shows, when it is known already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// Environment of later commands.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Longest time for all hooks together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hooks_timeout_seconds: Option<f64>,
    /// Passed to the hooks as `RETHAW_<KEY>`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, String>,
}

/// IPv4 settings of the interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipv4Config {
    /// Address with prefix length, `169.254.7.2/30`.
    pub cidr: String,
    /// Default gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
}

/// IPv6 settings of the interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipv6Config {
    /// Address with prefix length, `fd00:7::2/64`.
    pub cidr: String,
    /// Default gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
}

/// What a machine is to know of the network it is attached to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSettings {
    /// Hardware address, `02:xx:xx:xx:xx:xx`.
    pub mac: String,
    /// IPv4 address and gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Config>,
    /// IPv6 address and gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Config>,
    /// Name servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<String>,
}

impl IdentityRequest {
    /// The same request, for a machine that is attached to this network.
    #[must_use]
    pub fn on(self, network: NetworkSettings) -> Self {
        let NetworkSettings { mac, ipv4, ipv6, dns } = network;
        Self { mac: Some(mac), ipv4, ipv6, dns, ..self }
    }
}

/// Outcome of one identity item.
///
/// `verified` cannot be set from outside: in the guest only a read-back that equals the wanted
/// value yields it, and the host only ever parses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityItem {
    /// Name of the item.
    pub item: String,
    /// Short SHA-256 of the value before.
    pub old_digest: String,
    /// Short SHA-256 of the value read back after.
    pub new_digest: String,
    verified: bool,
    /// Time it took in the guest.
    pub micros: u64,
    /// Why it is not verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why there was nothing to do (no such interface in the template, no sshd, ...).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// Details worth showing, such as the clock's error bound.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, String>,
}

impl IdentityItem {
    /// An item whose new value was read back.
    pub(crate) fn proven(item: &str, proof: Verified, micros: u64) -> Self {
        let (old_digest, new_digest, details) = proof.into_parts();
        let item = item.to_owned();
        Self {
            item,
            old_digest,
            new_digest,
            verified: true,
            micros,
            error: None,
            skipped: None,
            details,
        }
    }

    /// An item that failed; the digests are of what could be read.
    pub(crate) fn failed(
        item: &str,
        digests: (String, String),
        error: String,
        micros: u64,
    ) -> Self {
        let (old_digest, new_digest) = digests;
        Self {
            item: item.to_owned(),
            old_digest,
            new_digest,
            verified: false,
            micros,
            error: Some(error),
            skipped: None,
            details: BTreeMap::new(),
        }
    }

    /// An item there was nothing to do for.
    pub(crate) fn skipped(item: &str, reason: String, micros: u64) -> Self {
        Self {
            item: item.to_owned(),
            old_digest: String::new(),
            new_digest: String::new(),
            verified: false,
            micros,
            error: None,
            skipped: Some(reason),
            details: BTreeMap::new(),
        }
    }

    /// Whether the new value was read back and is the wanted one.
    pub fn is_verified(&self) -> bool {
        self.verified
    }
}

/// Answer to `POST /identity`; with status 200 also when items failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityReport {
    /// Generation of the request.
    pub generation: String,
    /// Each item, in the order of its application.
    pub items: Vec<IdentityItem>,
    /// Time in the guest for all of it.
    pub total_micros: u64,
}

/// Why a report proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityFailure {
    /// The report answers another request.
    #[error("the report is for generation {got:?}, the request was for {wanted:?}")]
    OtherGeneration {
        /// Generation of the request.
        wanted: String,
        /// Generation of the report.
        got: String,
    },
    /// An item was attempted and not verified.
    #[error("identity item {item} failed: {reason}")]
    ItemFailed {
        /// The item.
        item: String,
        /// What the guest said.
        reason: String,
    },
    /// An item that must be there is not, or was skipped.
    #[error("identity item {item} is missing from the report")]
    ItemMissing {
        /// The item.
        item: String,
    },
}

/// An identity that was applied, read back and reported whole. Only [`IdentityReport::prove`]
/// makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProvenIdentity {
    report: IdentityReport,
}

impl ProvenIdentity {
    /// The report the proof rests on.
    pub fn report(&self) -> &IdentityReport {
        &self.report
    }
}

impl IdentityReport {
    /// Turns the report into a proof, or says what is wrong with it.
    ///
    /// # Errors
    /// The report is for another request, an item failed, or a required item is not there.
    pub fn prove(self, request: &IdentityRequest) -> Result<ProvenIdentity, IdentityFailure> {
        if self.generation != request.generation {
            return Err(IdentityFailure::OtherGeneration {
                wanted: request.generation.clone(),
                got: self.generation,
            });
        }
        if let Some(bad) = self.items.iter().find(|i| !i.verified && i.skipped.is_none()) {
            let reason = bad.error.clone().unwrap_or_else(|| "not verified".to_owned());
            return Err(IdentityFailure::ItemFailed { item: bad.item.clone(), reason });
        }
        let network = request.mac.as_ref().map(|_| "network");
        for wanted in REQUIRED_ITEMS.iter().copied().chain(network) {
            if !self.items.iter().any(|i| i.item == wanted && i.verified) {
                return Err(IdentityFailure::ItemMissing { item: wanted.to_owned() });
            }
        }
        Ok(ProvenIdentity { report: self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(verified: bool, without: &str) -> IdentityReport {
        let items = REQUIRED_ITEMS
            .iter()
            .filter(|name| **name != without)
            .map(|name| IdentityItem {
                item: (*name).to_owned(),
                old_digest: String::new(),
                new_digest: String::new(),
                verified: verified || *name != "clock",
                micros: 1,
                error: None,
                skipped: None,
                details: BTreeMap::new(),
            })
            .collect();
        IdentityReport { generation: "g".into(), items, total_micros: 8 }
    }

    #[test]
    fn only_a_whole_report_is_a_proof() {
        let request = IdentityRequest { generation: "g".into(), ..Default::default() };
        assert!(report(true, "").prove(&request).is_ok());
        assert!(matches!(
            report(true, "entropy").prove(&request),
            Err(IdentityFailure::ItemMissing { item }) if item == "entropy"
        ));
        assert!(matches!(
            report(false, "").prove(&request),
            Err(IdentityFailure::ItemFailed { item, .. }) if item == "clock"
        ));
        let other = IdentityRequest { generation: "h".into(), ..Default::default() };
        assert!(matches!(
            report(true, "").prove(&other),
            Err(IdentityFailure::OtherGeneration { .. })
        ));
        let with_mac = IdentityRequest {
            generation: "g".into(),
            mac: Some("02:00:00:00:00:01".into()),
            ..Default::default()
        };
        assert!(matches!(
            report(true, "").prove(&with_mac),
            Err(IdentityFailure::ItemMissing { item }) if item == "network"
        ));
    }
}
