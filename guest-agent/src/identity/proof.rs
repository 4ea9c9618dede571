//! How an item becomes verified: it is read, applied, read again from where it takes effect, and
//! the second reading is judged. There is no other way to a [`Verified`], and without one a report
//! cannot call an item verified.

use crate::agent::Agent;
use crate::clock::{HostTime, Instant};
use crate::wire::{IdentityItem, IdentityRequest};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;

/// Hex digits of a digest: enough to tell values apart, too few to guess a token from.
const DIGEST_BYTES: usize = 8;

/// What an item may use.
pub struct Context<'a> {
    /// The agent, with its paths and the workload.
    pub agent: &'a Agent,
    /// What is wanted.
    pub request: &'a IdentityRequest,
    /// The host's clock.
    pub host: HostTime,
    /// Name of an item that is made to fail, really; empty for none.
    pub fault: &'a str,
}

/// Why an item failed.
#[derive(Debug, thiserror::Error)]
pub enum ItemError {
    /// A system call or file operation failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The value read back is not the one that was set.
    #[error("read back {got}, wanted {wanted}")]
    Mismatch {
        /// What was set.
        wanted: String,
        /// What is there.
        got: String,
    },
    /// The item was told to fail.
    #[error("failed on request: the item was not applied")]
    Injected,
}

impl ItemError {
    /// Names what failed.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what: what.into(), source }
    }

    /// Two texts that should be the same.
    pub fn compare(wanted: &str, got: &str) -> Result<(), Self> {
        if wanted == got {
            return Ok(());
        }
        Err(Self::Mismatch { wanted: format!("{wanted:?}"), got: format!("{got:?}") })
    }
}

/// A value as it is in effect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    /// The value; one line per source where it has several.
    pub value: String,
    /// What of it may be shown in the report.
    pub details: BTreeMap<String, String>,
}

impl Reading {
    /// A value with nothing to show.
    pub fn of(value: impl Into<String>) -> Self {
        Self { value: value.into(), details: BTreeMap::new() }
    }

    fn digest(&self) -> String {
        hex::encode(&Sha256::digest(self.value.as_bytes())[..DIGEST_BYTES])
    }
}

/// Work that takes its time.
pub type Work<'a> = Pin<Box<dyn Future<Output = Result<(), ItemError>> + 'a>>;

/// One thing that makes a machine itself. What drives items is written once for all of them, and not
/// compiled for each: a clone runs this code for the first time, and an emulated one pays for its
/// length.
pub trait Item {
    /// Its name in the report.
    fn name(&self) -> &'static str;

    /// Why there is nothing to do, if so.
    fn not_applicable(&self, _context: &Context<'_>) -> Option<String> {
        None
    }

    /// Reads the value from where it takes effect.
    ///
    /// # Errors
    /// It cannot be read.
    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError>;

    /// Sets the value.
    ///
    /// # Errors
    /// It cannot be set.
    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError>;

    /// The part of setting it that has to be waited for; most have none.
    fn work<'a>(&'a mut self, _context: &'a Context<'_>) -> Option<Work<'a>> {
        None
    }

    /// Judges what was read before and after.
    ///
    /// # Errors
    /// `new` is not what was wanted.
    fn check(&self, context: &Context<'_>, old: &Reading, new: &Reading) -> Result<(), ItemError>;
}

/// Proof that an item's value was read back after it was set, and is the wanted one.
#[derive(Debug)]
pub struct Verified {
    old_digest: String,
    new_digest: String,
    details: BTreeMap<String, String>,
}

impl Verified {
    /// Reads back and judges; the only constructor.
    fn read_back(
        item: &dyn Item,
        context: &Context<'_>,
        old: &Reading,
    ) -> Result<Self, (String, ItemError)> {
        let new = item.read(context).map_err(|e| (String::new(), e))?;
        let (old_digest, new_digest) = (old.digest(), new.digest());
        match item.check(context, old, &new) {
            Ok(()) => Ok(Self { old_digest, new_digest, details: new.details }),
            Err(error) => Err((new_digest, error)),
        }
    }

    /// Digest before, digest after, details.
    pub(crate) fn into_parts(self) -> (String, String, BTreeMap<String, String>) {
        (self.old_digest, self.new_digest, self.details)
    }
}

/// The report as it grows. After the first failure nothing more is applied.
#[derive(Debug, Default)]
pub struct Run {
    items: Vec<IdentityItem>,
    failed: bool,
}

impl Run {
    /// Applies an item and reports it.
    pub async fn item(&mut self, item: &mut dyn Item, context: &Context<'_>) {
        if self.failed {
            return;
        }
        let outcome = outcome(item, context).await;
        self.failed = !outcome.is_verified() && outcome.skipped.is_none();
        self.items.push(outcome);
    }

    /// The items, and whether one failed.
    pub fn finish(self) -> (Vec<IdentityItem>, bool) {
        (self.items, self.failed)
    }
}

async fn outcome(item: &mut dyn Item, context: &Context<'_>) -> IdentityItem {
    let name = item.name();
    let Ok(started) = Instant::now() else {
        let error = "the monotonic clock cannot be read".to_owned();
        return IdentityItem::failed(name, Default::default(), error, 0);
    };
    if let Some(reason) = item.not_applicable(context) {
        return IdentityItem::skipped(name, reason, started.micros());
    }
    match attempt(item, context).await {
        Ok(proof) => IdentityItem::proven(name, proof, started.micros()),
        Err((digests, error)) => {
            IdentityItem::failed(name, digests, error.to_string(), started.micros())
        }
    }
}

async fn attempt(
    item: &mut dyn Item,
    context: &Context<'_>,
) -> Result<Verified, ((String, String), ItemError)> {
    let old = item.read(context).map_err(|e| (Default::default(), e))?;
    let mut applied =
        if context.fault == item.name() { Err(ItemError::Injected) } else { item.apply(context) };
    if applied.is_ok()
        && let Some(work) = item.work(context)
    {
        applied = work.await;
    }
    applied.map_err(|e| ((old.digest(), String::new()), e))?;
    Verified::read_back(item, context, &old).map_err(|(new, e)| ((old.digest(), new), e))
}
