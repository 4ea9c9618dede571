//! What services that are gone for good left on the host: killed with their VMs, and never started
//! again on their data. The next service that starts here undoes it; `rethaw doctor` shows it and
//! `rethaw gc` removes it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::links::Links;
use super::note::{self, Note, namespace};
use super::plan::Plan;

/// One service's.
#[derive(Debug)]
pub struct Leftover {
    /// File of its note.
    pub note: PathBuf,
    /// Its data directory; there or not.
    pub home: PathBuf,
    /// Name of its nftables table.
    pub table: String,
    /// Switches below `/proc/sys/net` that it had switched on.
    pub switches: Vec<String>,
    /// When the service started.
    pub since: SystemTime,
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {}", self.table)?;
        for switch in &self.switches {
            write!(f, ", {switch}")?;
        }
        write!(f, " of a service of {} that is no more", self.home.display())
    }
}

/// A note whose service is dead and whose VMs are gone; with a VM goes its cable.
fn is_left(note: &Note, links: &[(String, u32)]) -> bool {
    let dead = note.owner.as_ref().is_some_and(super::note::Owner::is_dead);
    let plan = Plan::new(&note.home.to_string_lossy(), std::net::Ipv4Addr::UNSPECIFIED, false);
    let has_vms = || links.iter().any(|(name, _)| name.starts_with(&plan.link_prefix));
    dead && note.table == plan.table && !has_vms()
}

/// Looks for what was left in this network namespace, among the notes of `folder`.
///
/// # Errors
/// The links cannot be listed.
pub fn find(folder: &Path) -> io::Result<Vec<Leftover>> {
    find_but(folder, Path::new(""))
}

fn find_but(folder: &Path, own: &Path) -> io::Result<Vec<Leftover>> {
    let (here, links) = (namespace()?, Links::open()?.all()?);
    let left = note::all(folder, own).into_iter();
    let left = left.filter(|(_, note)| note.namespace == here && is_left(note, &links));
    left.map(|(path, note)| {
        let since = path.metadata()?.modified()?;
        let switches = note.switches.into_iter().collect();
        Ok(Leftover { note: path, home: note.home, table: note.table, switches, since })
    })
    .collect()
}

/// Undoes what the note in `path` says, unless a service has come to it meanwhile.
///
/// # Errors
/// What cannot be undone.
pub fn remove(path: &Path) -> io::Result<()> {
    let _lock = note::lock(path.parent().unwrap_or(Path::new("/")))?;
    undo(path)
}

fn undo(path: &Path) -> io::Result<()> {
    let note = Note::read(path)?;
    if note.namespace == namespace()? && is_left(&note, &Links::open()?.all()?) {
        note.undo(path)?;
    }
    Ok(())
}

/// Undoes everything that others than `own` left; the lock is held. What cannot be undone is said,
/// and is nothing that a service cannot start with.
pub(super) fn sweep(own: &Path) {
    let Some(folder) = own.parent() else { return };
    let done = find_but(folder, own).and_then(|found| {
        found.iter().try_for_each(|leftover| {
            undo(&leftover.note)?;
            tracing::info!("network: removed {leftover}");
            Ok(())
        })
    });
    if let Err(e) = done {
        tracing::warn!("network: what another service left stays: {e}");
    }
}
