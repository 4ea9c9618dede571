//! Identities: minted here, applied and read back by the guest agent, unique across the service.

use std::collections::BTreeMap;

use guest_agent::wire::{Base64, IdentityRequest, ProvenIdentity};
use rand::RngCore;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ids;
use super::token::AccessToken;
use crate::net::Addresses;
use crate::net::policy::Policy;

/// The values that make one machine another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Host name.
    pub hostname: String,
    /// `/etc/machine-id`.
    pub machine_id: String,
    /// Hardware address of `eth0`.
    pub mac: String,
    /// What `/proc/sys/kernel/random/boot_id` shows.
    pub boot_id: String,
    /// Name of this identity; new each time one is applied.
    pub generation: String,
}

/// What a VM gets from the one it is made for.
#[derive(Debug, Clone)]
pub struct Owner {
    /// Token of the sandbox.
    pub access_token: AccessToken,
    /// Environment of every command.
    pub env: BTreeMap<String, String>,
    /// What the VM may reach.
    pub network: Policy,
}

/// What the guest reported for each item, in the form the API shows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = IdentityItem)]
pub struct ItemView {
    /// Name of the item.
    pub item: String,
    /// Short digest of the value before.
    pub old_digest: String,
    /// Short digest of the value read back.
    pub new_digest: String,
    /// Read back and equal to what was wanted.
    pub verified: bool,
    /// Time in the guest.
    pub micros: u64,
    /// Why there was nothing to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// Details, such as the clock's error bound.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, String>,
}

impl Identity {
    /// A new identity for the VM `id`. Random enough that a repeat means a broken random number
    /// generator, which is what the store's uniqueness check is for.
    pub fn mint(id: &str) -> Self {
        let mut mac = [0_u8; 6];
        rand::rng().fill_bytes(&mut mac);
        // Locally administered, unicast.
        mac[0] = 0x02;
        let mac: Vec<String> = mac.iter().map(|b| format!("{b:02x}")).collect();
        Self {
            hostname: format!("sbx-{id}"),
            machine_id: ids::new_uuid().replace('-', ""),
            mac: mac.join(":"),
            boot_id: ids::new_uuid(),
            generation: ids::new_uuid(),
        }
    }

    /// The request that applies it, and hands the VM over when it is somebody's already. Entropy
    /// and clock are taken now: send it at once.
    pub fn request(&self, owner: Option<&Owner>, addresses: Option<&Addresses>) -> IdentityRequest {
        let mut entropy = vec![0_u8; 64];
        rand::rng().fill_bytes(&mut entropy);
        let request = IdentityRequest {
            generation: self.generation.clone(),
            entropy: Base64(entropy),
            wall_clock_unix_nanos: ids::wall_clock_unix_nanos(),
            mac: Some(self.mac.clone()),
            hostname: self.hostname.clone(),
            machine_id: self.machine_id.clone(),
            boot_id: self.boot_id.clone(),
            access_token: owner.map(|o| o.access_token.secret.clone()),
            env: owner.map(|o| o.env.clone()).unwrap_or_default(),
            ..IdentityRequest::default()
        };
        match addresses {
            Some(addresses) => request.on(addresses.for_guest(&self.mac)),
            None => request,
        }
    }
}

/// The report behind a proof, for the API.
pub fn item_views(proof: &ProvenIdentity) -> Vec<ItemView> {
    let items = proof.report().items.iter();
    items
        .map(|i| ItemView {
            item: i.item.clone(),
            old_digest: i.old_digest.clone(),
            new_digest: i.new_digest.clone(),
            verified: i.is_verified(),
            micros: i.micros,
            skipped: i.skipped.clone(),
            details: i.details.clone(),
        })
        .collect()
}
