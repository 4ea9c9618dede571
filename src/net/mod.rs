//! Every sandbox its own network.
//!
//! ```text
//! guest eth0 -- tap0 [ slot's namespace: rules.rs ] up0 -- rtXXXXXX-n [ host.rs ] -- the outside
//!                      gateway and name server (dns.rs)
//! ```
//!
//! A VM gets a slot ([`slot`]) when it is spawned and keeps it until it is gone; slots are made ahead
//! ([`Network::take`]). A VM that comes back from a pause gets its old one, which is kept for a moment
//! ([`Network::keep`]), or one with the same addresses, unless another VM has them by then. What a sandbox may reach ([`policy`]) is enforced in its slot, out of the
//! guest's reach; that it reaches neither the host nor another sandbox is enforced twice, in the slot
//! and in the host's table ([`host`]). Everything is done by netlink from this process: nothing is
//! spawned.
//!
//! Where slots cannot be made (no rights, no nftables) the service runs without: guests have a NIC
//! without a cable, and ports are reached through the agent.

pub mod cidr;
mod dns;
mod host;
mod lease;
pub mod leftover;
mod links;
mod nft;
mod note;
mod plan;
pub mod policy;
mod probe;
mod rules;
mod slot;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use cidr::Cidr;
use host::Host;
pub use lease::{Lease, NetworkRules};
pub use nft::Count;
pub use note::{NOTE, NOTES};
pub use plan::Addresses;
use policy::Policy;
pub use probe::probe;
use slot::{Shared, Slot};

/// Slots kept ahead: for two restores of a pool, its spare process, and one claim that finds nothing.
const AHEAD: usize = 4;
/// Numbers tried for one slot: those whose VM is not gone yet are passed over.
const TRIES: usize = 16;
/// How long the slot of a VM that was paused is there for its return: until its number can be had
/// again, or longer.
const KEEP: Duration = Duration::from_secs(10);
/// Pause after a slot that could not be made; whoever needs one makes an attempt of its own.
const RETRY: Duration = Duration::from_secs(2);

/// What the operator said.
#[derive(Debug, Clone, Default)]
pub struct NetworkConfig {
    /// The service's data directory, which names its links and its table.
    pub home: PathBuf,
    /// The file in which changes to the host are noted; gone with the machine.
    pub note: PathBuf,
    /// The slots' network, a /16.
    pub network: Option<Ipv4Addr>,
    /// Name servers, in place of the host's.
    pub dns: Vec<IpAddr>,
    /// Networks that no sandbox may reach, besides those that none ever may.
    pub denied: Vec<Cidr>,
}

/// Why a VM has no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The host's side.
    #[error("the network cannot be set up: {0}")]
    Host(#[source] io::Error),
    /// No slot.
    #[error("no network slot: {0}")]
    Slot(#[source] io::Error),
    /// Rules.
    #[error("network rules: {0}")]
    Rules(#[source] io::Error),
    /// Every number is in use.
    #[error("no network slot: all {} are in use", plan::SLOTS - 1)]
    Exhausted,
}

/// All slots of a service.
#[derive(Debug)]
pub struct Network {
    host: Host,
    denied: Vec<Cidr>,
    resolver: Arc<dns::Resolver>,
    // Numbers nobody has, the longest unused first.
    free: Mutex<VecDeque<u16>>,
    ready: Mutex<VecDeque<Slot>>,
    wake: Notify,
    closed: AtomicBool,
    live: Mutex<HashMap<u16, Weak<Shared>>>,
    kept: Mutex<Vec<Kept>>,
    // What slots that are gone had counted.
    past: Mutex<HashMap<String, u64>>,
}

/// A slot that waits for its VM.
#[derive(Debug)]
struct Kept {
    until: Instant,
    mac: String,
    lease: Lease,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs what blocks for some milliseconds on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

impl Network {
    /// Sets the host's side up; slots come with [`Network::keep_ready`].
    ///
    /// # Errors
    /// What is missing, or what the kernel refuses.
    pub async fn start(config: NetworkConfig) -> Result<Arc<Self>, NetworkError> {
        probe::probe().await.map_err(NetworkError::Host)?;
        let NetworkConfig { home, note, network, dns, denied } = config;
        let host = blocking(move || Host::set_up(&home, &note, network)).await;
        let host = host.map_err(NetworkError::Host)?;
        // Not from the start: what a service before this one used last comes last.
        let first = rand::random_range(1..plan::SLOTS);
        let free = (first..plan::SLOTS).chain(1..first).collect();
        Ok(Arc::new(Self {
            host,
            denied,
            resolver: Arc::new(dns::Resolver::new(dns)),
            free: Mutex::new(free),
            ready: Mutex::default(),
            wake: Notify::new(),
            closed: AtomicBool::new(false),
            live: Mutex::default(),
            kept: Mutex::default(),
            past: Mutex::default(),
        }))
    }

    /// The network that slots' addresses are in, and whether they have IPv6.
    pub fn describe(&self) -> (Cidr, bool) {
        (self.host.plan.v4, self.host.plan.v6.is_some())
    }

    /// Keeps slots ready until closed, but makes none while a claim is under way.
    pub async fn keep_ready(self: Arc<Self>, mut claims: watch::Receiver<u32>) {
        while !self.closed.load(Ordering::Relaxed) {
            if lock(&self.ready).len() >= AHEAD {
                self.wake.notified().await;
                continue;
            }
            let _ = claims.wait_for(|under_way| *under_way == 0).await;
            match self.make().await {
                Ok(slot) => lock(&self.ready).push_back(slot),
                Err(e) => {
                    tracing::warn!("{e}");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
        let last: Vec<Slot> = lock(&self.ready).drain(..).collect();
        for slot in last {
            self.give_up(slot);
        }
    }

    async fn make(self: &Arc<Self>) -> Result<Slot, NetworkError> {
        for _ in 0..TRIES {
            let number = lock(&self.free).pop_front().ok_or(NetworkError::Exhausted)?;
            match self.make_number(number).await {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                made => return made.map_err(NetworkError::Slot),
            }
        }
        Err(NetworkError::Slot(io::ErrorKind::AlreadyExists.into()))
    }

    /// Makes the slot of a number that was free, and is again where that fails.
    async fn make_number(self: &Arc<Self>, number: u16) -> io::Result<Slot> {
        let (started, network) = (Instant::now(), Arc::clone(self));
        let made = blocking(move || Slot::make(&network.host.plan, number, &network.denied)).await;
        match &made {
            Ok(_) => metrics::histogram!("rethaw_net_slot_prepare_duration_seconds")
                .record(started.elapsed().as_secs_f64()),
            Err(_) => lock(&self.free).push_back(number),
        }
        made
    }

    /// The slot with these addresses, unless another has them or they are of another plan.
    async fn same(self: &Arc<Self>, addresses: &Addresses) -> Option<Slot> {
        let number = addresses.slot;
        if self.host.plan.addresses(number) != *addresses {
            return None;
        }
        let take = |row: &mut VecDeque<u16>| {
            let at = row.iter().position(|free| *free == number)?;
            row.remove(at)
        };
        take(&mut lock(&self.free))?;
        self.make_number(number).await.ok()
    }

    /// A slot for the VM with this hardware address, where possible one with the addresses it had;
    /// nothing passes yet.
    ///
    /// # Errors
    /// There is none and none can be made.
    pub async fn take(
        self: &Arc<Self>,
        mac: &str,
        before: Option<&Addresses>,
    ) -> Result<Lease, NetworkError> {
        if let Some(lease) = before.and_then(|addresses| self.kept(mac, addresses)) {
            return Ok(lease);
        }
        let mac = parse_mac(mac).ok_or_else(|| {
            NetworkError::Rules(io::Error::new(io::ErrorKind::InvalidInput, mac.to_owned()))
        })?;
        let same = match before {
            Some(addresses) => self.same(addresses).await,
            None => None,
        };
        let slot = match same {
            Some(slot) => slot,
            None => self.next().await?,
        };
        let attached = blocking(move || {
            let done = slot.attach(mac);
            Ok((slot, done))
        });
        let (slot, done) = attached.await.map_err(NetworkError::Slot)?;
        match done {
            Ok(()) => self.lease(slot).map_err(NetworkError::Slot),
            Err(e) => {
                self.give_up(slot);
                Err(NetworkError::Rules(e))
            }
        }
    }

    /// Keeps the slot of a VM that was paused for a moment: coming back at once it finds everything
    /// as it was.
    pub fn keep(self: &Arc<Self>, lease: Lease, mac: &str) {
        if self.closed.load(Ordering::Relaxed) {
            return;
        }
        let kept = Kept { until: Instant::now() + KEEP, mac: mac.to_owned(), lease };
        lock(&self.kept).push(kept);
        let network = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(KEEP).await;
            if let Some(network) = network.upgrade() {
                network.drop_over();
            }
        });
    }

    /// The VM will not come back.
    pub fn let_go(&self, mac: &str) {
        let gone: Vec<Kept> = lock(&self.kept).extract_if(.., |kept| kept.mac == mac).collect();
        drop(gone);
    }

    fn kept(&self, mac: &str, addresses: &Addresses) -> Option<Lease> {
        let mut kept = lock(&self.kept);
        let is = |k: &Kept| k.mac == mac && k.lease.addresses() == addresses;
        let at = kept.iter().position(is)?;
        Some(kept.swap_remove(at).lease)
    }

    fn drop_over(&self) {
        let over: Vec<Kept> = {
            let now = Instant::now();
            lock(&self.kept).extract_if(.., |kept| kept.until <= now).collect()
        };
        // Outside: a slot that is given up takes other locks.
        drop(over);
    }

    async fn next(self: &Arc<Self>) -> Result<Slot, NetworkError> {
        let ready = lock(&self.ready).pop_front();
        self.wake.notify_one();
        match ready {
            Some(slot) => Ok(slot),
            None => self.make().await,
        }
    }

    /// The slot that the process `pid` of a taken-back VM runs in.
    ///
    /// # Errors
    /// The process or its namespace is gone, or is another's.
    pub async fn adopt(
        self: &Arc<Self>,
        pid: i32,
        addresses: Addresses,
        policy: Policy,
    ) -> Result<Lease, NetworkError> {
        if self.host.plan.addresses(addresses.slot) != addresses {
            let message = "its addresses are of another plan";
            return Err(NetworkError::Slot(io::Error::other(message)));
        }
        lock(&self.free).retain(|number| *number != addresses.slot);
        let slot = blocking(move || Slot::adopt(pid, addresses, &policy)).await;
        self.lease(slot.map_err(NetworkError::Slot)?).map_err(NetworkError::Slot)
    }

    fn lease(self: &Arc<Self>, slot: Slot) -> io::Result<Lease> {
        let shared = slot.shared();
        lock(&self.live).insert(shared.addresses.slot, Arc::downgrade(shared));
        Lease::new(slot, Arc::clone(self))
    }

    /// Forgets a slot. Its number comes back at the very end of the row, and is passed over as long
    /// as anything of the slot is there.
    fn give_up(&self, slot: Slot) {
        let shared = Arc::clone(slot.shared());
        let number = shared.addresses.slot;
        lock(&self.live).remove(&number);
        if let Ok(counters) = shared.counters() {
            let mut past = lock(&self.past);
            for (name, count) in counters {
                *past.entry(name).or_default() += count.packets;
            }
        }
        drop((slot, shared));
        lock(&self.free).push_back(number);
    }

    /// Packets by what became of them, since the start: of all slots, and of the host's table.
    pub fn counted(&self) -> HashMap<String, u64> {
        let mut counted = lock(&self.past).clone();
        let live: Vec<_> = lock(&self.live).values().filter_map(Weak::upgrade).collect();
        let host = nft::open().and_then(|mut netlink| self.host.counters(&mut netlink));
        let all = live.iter().filter_map(|shared| shared.counters().ok()).chain(host.ok());
        for (name, count) in all.flatten() {
            *counted.entry(name).or_default() += count.packets;
        }
        counted
    }

    /// Slots that are ready, slots that VMs have.
    pub fn slots(&self) -> (usize, usize) {
        (lock(&self.ready).len(), lock(&self.live).len())
    }

    /// Ends [`Network::keep_ready`].
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.wake.notify_one();
        let kept = std::mem::take(&mut *lock(&self.kept));
        drop(kept);
    }

    /// Undoes what was changed on the host; the VMs are gone.
    pub async fn take_down(self: &Arc<Self>) {
        let network = Arc::clone(self);
        let done = blocking(move || {
            network.host.take_down();
            Ok(())
        });
        if let Err(e) = done.await {
            tracing::error!("network: {e}");
        }
    }
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}
