//! A slot in the hands of a VM, with its name server running.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::nft::Count;
use super::plan::Addresses;
use super::policy::Policy;
use super::slot::{Shared, Slot};
use super::{Network, NetworkError, blocking, dns, rules};

/// A VM's network. Dropped after the VM: its number is then free again, in time.
#[derive(Debug)]
pub struct Lease {
    slot: Option<Slot>,
    shared: Arc<Shared>,
    network: Arc<Network>,
    names: Vec<JoinHandle<()>>,
}

impl Lease {
    pub(super) fn new(mut slot: Slot, network: Arc<Network>) -> std::io::Result<Self> {
        let shared = Arc::clone(slot.shared());
        let mut lease = Self { slot: None, shared, network, names: Vec::new() };
        if let Some(sockets) = slot.take_sockets() {
            let resolver = Arc::clone(&lease.network.resolver);
            lease.names = dns::serve(sockets, &lease.shared, &resolver)?;
        }
        lease.slot = Some(slot);
        Ok(lease)
    }

    /// What the VM is called.
    pub fn addresses(&self) -> &Addresses {
        &self.shared.addresses
    }

    /// The link a VMM opens, and the namespace it has to be in.
    pub fn nic(&self) -> (String, Option<PathBuf>) {
        (rules::TAP.to_owned(), self.slot.as_ref().map(Slot::netns_path))
    }

    /// The slot's own part of it.
    #[cfg(test)]
    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// A handle to the rules, for as long as the VM lives.
    pub fn rules(&self) -> NetworkRules {
        NetworkRules(Arc::clone(&self.shared))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        for task in &self.names {
            task.abort();
        }
        if let Some(slot) = self.slot.take() {
            self.network.give_up(slot);
        }
    }
}

/// A VM's rules.
#[derive(Debug, Clone)]
pub struct NetworkRules(Arc<Shared>);

impl NetworkRules {
    /// Replaces what the VM may reach; nothing is done where that is so already.
    ///
    /// # Errors
    /// What the kernel says; what was stays.
    pub async fn set_policy(&self, policy: &Policy) -> Result<(), NetworkError> {
        let old = self.0.policy();
        if (&old.internet, old.limits) == (&policy.internet, policy.limits) {
            return Ok(());
        }
        let (shared, policy) = (Arc::clone(&self.0), policy.clone());
        blocking(move || shared.set_policy(&policy)).await.map_err(NetworkError::Rules)
    }

    /// What passed and what did not, by counter.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn counters(&self) -> Result<Vec<(String, Count)>, NetworkError> {
        let shared = Arc::clone(&self.0);
        blocking(move || shared.counters()).await.map_err(NetworkError::Rules)
    }
}
