//! Quotas: whether there is room for more, decided before anything is started.
//!
//! What is being made is set aside in an [`Admission`] until the sandbox itself is counted, so that
//! requests at the same instant cannot take the same room twice. For that moment it counts double:
//! a request may be refused that would just have fitted, never the other way round.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::Engine;
use super::keys::{Account, Quotas};
use super::sandbox::{Sandbox, State};
use super::template::ReadyTemplate;

/// What sandboxes take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// How many.
    #[serde(skip)]
    pub sandboxes: u64,
    /// Processors.
    pub vcpus: u64,
    /// Memory.
    pub memory_bytes: u64,
    /// What their disks can grow to.
    pub disk_bytes: u64,
}

impl Size {
    /// One sandbox of a template.
    pub fn of(template: &ReadyTemplate) -> Self {
        let disk = template.manifest.files.get(snapshotter::manifest::SCRATCH);
        Self {
            sandboxes: 1,
            vcpus: template.size.vcpus.into(),
            memory_bytes: template.size.memory_bytes,
            disk_bytes: disk.map_or(0, |file| file.bytes),
        }
    }

    /// What of it a paused sandbox does not take.
    pub fn running_part(self) -> Self {
        Self { sandboxes: 0, disk_bytes: 0, ..self }
    }

    fn times(self, n: u32) -> Self {
        let n = u64::from(n);
        Self {
            sandboxes: self.sandboxes * n,
            vcpus: self.vcpus * n,
            memory_bytes: self.memory_bytes.saturating_mul(n),
            disk_bytes: self.disk_bytes.saturating_mul(n),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes + other.sandboxes,
            vcpus: self.vcpus + other.vcpus,
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_add(other.disk_bytes),
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes.saturating_sub(other.sandboxes),
            vcpus: self.vcpus.saturating_sub(other.vcpus),
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_sub(other.disk_bytes),
        }
    }
}

/// There is no room.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuotaError {
    /// Too much at a time.
    #[error("{whose} may have {limit} {what} at a time, has {used} and needs {wanted} more")]
    Full {
        /// The key's name, or the service.
        whose: String,
        /// The quota.
        what: &'static str,
        /// Its value.
        limit: u64,
        /// What is taken.
        used: u64,
        /// What was asked for.
        wanted: u64,
        /// When the first sandbox in the way is due to go, at the latest.
        retry_after: Duration,
    },
    /// Too many in a short time.
    #[error("{whose} may make {rate} sandboxes per second")]
    TooFast {
        /// The key's name, or the service.
        whose: String,
        /// The rate, as it was written.
        rate: String,
        /// When the next one may be made.
        retry_after: Duration,
    },
}

impl QuotaError {
    /// When it is worth trying again.
    pub fn retry_after(&self) -> Duration {
        match self {
            Self::Full { retry_after, .. } | Self::TooFast { retry_after, .. } => *retry_after,
        }
    }
}

/// Tokens that come back with time; one for each sandbox made.
#[derive(Debug)]
pub struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// A bucket from which nothing was taken.
    pub fn full(rate: Option<f64>) -> Self {
        Self { tokens: rate.map_or(0.0, capacity), at: Instant::now() }
    }

    /// Takes `n`, or says how long it takes until they are there. More than the bucket holds is
    /// given when it is full, and owed.
    fn take(&mut self, rate: f64, n: u32, now: Instant) -> Result<(), Duration> {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + since * rate).min(capacity(rate));
        self.at = now;
        let needed = f64::from(n).min(capacity(rate));
        if self.tokens + 1e-9 < needed {
            let wait = (needed - self.tokens) / rate;
            return Err(Duration::try_from_secs_f64(wait).unwrap_or(Duration::MAX));
        }
        self.tokens -= f64::from(n);
        Ok(())
    }
}

fn capacity(rate: f64) -> f64 {
    rate.max(1.0)
}

/// Room that is set aside; given back when dropped.
#[derive(Debug)]
#[must_use]
pub struct Admission(Vec<(Arc<Account>, Size)>);

impl Drop for Admission {
    fn drop(&mut self) {
        for (account, size) in &self.0 {
            let mut reserved = account.reserved.lock().unwrap_or_else(PoisonError::into_inner);
            *reserved = reserved.minus(*size);
        }
    }
}

/// Longest that a client is told to wait for a sandbox to go.
const MAX_RETRY: Duration = Duration::from_secs(60);

impl Engine {
    /// Sets room aside for `count` new sandboxes of this size, for the key `owner` and within what
    /// the whole service may have.
    pub(super) fn admit(
        &self,
        owner: Option<&str>,
        size: Size,
        count: u32,
    ) -> Result<Admission, QuotaError> {
        let admission = self.reserve(owner, size.times(count))?;
        let now = Instant::now();
        for (account, _) in &admission.0 {
            let Some(rate) = account.key.quotas.claims_per_second else { continue };
            let mut bucket = account.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.take(rate, count, now).map_err(|retry_after| QuotaError::TooFast {
                whose: whose(account),
                rate: rate.to_string(),
                retry_after,
            })?;
        }
        Ok(admission)
    }

    /// Sets room aside for a sandbox that comes back.
    pub(super) fn readmit(&self, sandbox: &Sandbox) -> Result<Admission, QuotaError> {
        let (owner, size) = sandbox.with_data(|d| (d.owner.clone(), d.size));
        self.reserve(owner.as_deref(), size.running_part())
    }

    fn reserve(&self, owner: Option<&str>, size: Size) -> Result<Admission, QuotaError> {
        let own = owner.and_then(|id| self.keys().account(id));
        let mut admission = Admission(Vec::new());
        for account in own.into_iter().chain([Arc::clone(&self.limits)]) {
            if account.key.quotas == Quotas::default() {
                continue;
            }
            let of = (!Arc::ptr_eq(&account, &self.limits)).then_some(account.key.id.as_str());
            let mut reserved = account.reserved.lock().unwrap_or_else(PoisonError::into_inner);
            let (used, first_end) = self.usage(of);
            check(&account, used.plus(*reserved), size, first_end)?;
            *reserved = reserved.plus(size);
            drop(reserved);
            admission.0.push((account, size));
        }
        Ok(admission)
    }

    /// What a key's sandboxes take, or all of them, and when the first one's time is up.
    fn usage(&self, owner: Option<&str>) -> (Size, Option<OffsetDateTime>) {
        let (mut used, mut first_end) = (Size::default(), None);
        for sandbox in &self.sandboxes {
            let paused = sandbox.state() == State::Paused;
            sandbox.with_data(|data| {
                if owner.is_some() && owner != data.owner.as_deref() {
                    return;
                }
                let mut size = Size { sandboxes: 1, ..data.size };
                if paused {
                    size = size.minus(size.running_part());
                } else {
                    first_end = first_end.min(Some(data.expires_at)).or(Some(data.expires_at));
                }
                used = used.plus(size);
            });
        }
        (used, first_end)
    }
}

fn whose(account: &Account) -> String {
    format!("{:?}", account.key.name)
}

fn check(
    account: &Account,
    used: Size,
    wanted: Size,
    first_end: Option<OffsetDateTime>,
) -> Result<(), QuotaError> {
    let quotas = &account.key.quotas;
    let all = [
        ("sandboxes", quotas.sandboxes.map(u64::from), used.sandboxes, wanted.sandboxes),
        ("vcpus", quotas.vcpus.map(u64::from), used.vcpus, wanted.vcpus),
        ("memory_bytes", quotas.memory_bytes, used.memory_bytes, wanted.memory_bytes),
        ("disk_bytes", quotas.disk_bytes, used.disk_bytes, wanted.disk_bytes),
    ];
    for (what, limit, used, wanted) in all {
        let Some(limit) = limit else { continue };
        if wanted > 0 && used.saturating_add(wanted) > limit {
            let left = first_end.map(|end| end - OffsetDateTime::now_utc());
            let left = left.and_then(|left| Duration::try_from(left).ok()).unwrap_or(MAX_RETRY);
            let retry_after = left.clamp(Duration::from_secs(1), MAX_RETRY);
            let whose = whose(account);
            return Err(QuotaError::Full { whose, what, limit, used, wanted, retry_after });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_with_time() {
        let now = Instant::now();
        let mut bucket = Bucket { tokens: 2.0, at: now };
        assert_eq!(bucket.take(2.0, 1, now), Ok(()));
        assert_eq!(bucket.take(2.0, 1, now), Ok(()));
        let wait = bucket.take(2.0, 1, now).unwrap_err();
        assert_eq!(wait, Duration::from_millis(500));
        assert_eq!(bucket.take(2.0, 1, now + wait), Ok(()));
        // Never more than it holds, however long nobody came.
        let later = now + Duration::from_secs(3600);
        assert_eq!(bucket.take(2.0, 2, later), Ok(()));
        assert!(bucket.take(2.0, 1, later).is_err());
    }

    #[test]
    fn many_at_once_are_given_by_a_full_bucket_and_owed() {
        let now = Instant::now();
        let mut bucket = Bucket { tokens: 1.0, at: now };
        assert_eq!(bucket.take(0.5, 3, now), Ok(()));
        assert_eq!(bucket.take(0.5, 1, now).unwrap_err(), Duration::from_secs(6));
    }

    #[test]
    fn each_quota_is_named_with_its_numbers() {
        let one = Size { sandboxes: 1, vcpus: 2, memory_bytes: 512, disk_bytes: 1000 };
        let full = |quotas: Quotas, used: Size| {
            let account = Account::all_powerful("ci", quotas);
            check(&account, used, one, None)
        };
        let quotas = Quotas { vcpus: Some(4), ..Quotas::default() };
        assert_eq!(full(quotas.clone(), one), Ok(()));
        let message = full(quotas, one.plus(one)).unwrap_err().to_string();
        assert_eq!(message, "\"ci\" may have 4 vcpus at a time, has 4 and needs 2 more");
        let quotas = Quotas { disk_bytes: Some(1999), ..Quotas::default() };
        assert!(full(quotas.clone(), Size::default()).is_ok() && full(quotas, one).is_err());
        // A paused sandbox that comes back needs no disk and no place of its own.
        let quotas = Quotas { sandboxes: Some(1), disk_bytes: Some(1000), ..Quotas::default() };
        let account = Account::all_powerful("ci", quotas);
        assert_eq!(check(&account, one, one.running_part(), None), Ok(()));
    }
}
