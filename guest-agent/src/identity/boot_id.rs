//! The boot id. The kernel's cannot be changed, so a file of ours is mounted over it; what the
//! kernel hands to fresh mounts of /proc stays the template's.

use super::proof::{Context, Item, ItemError, Reading};
use super::write;
use crate::agent::Agent;
use nix::mount::{MsFlags, mount};
use std::fs;
use std::io;
use std::path::Path;

const KERNEL: &str = "/proc/sys/kernel/random/boot_id";
const OURS: &str = "/run/rethaw/boot_id";

/// The item.
#[derive(Debug)]
pub struct BootId;

impl Item for BootId {
    fn name(&self) -> &'static str {
        "boot_id"
    }

    fn read(&self, _context: &Context<'_>) -> Result<Reading, ItemError> {
        Ok(Reading::of(write::read(Path::new(KERNEL))?.trim_end()))
    }

    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        let wanted = &context.request.boot_id;
        let ours = context.agent.path(OURS);
        write::update(&ours, &format!("{wanted}\n"), 0o444)?;
        // Usually the file is mounted already: from settling, or from an earlier identity.
        if self.read(context)?.value != *wanted {
            mount_over(&ours).map_err(ItemError::io("mount our boot_id"))?;
        }
        Ok(())
    }

    fn check(&self, context: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        ItemError::compare(&context.request.boot_id, &new.value)
    }
}

fn mount_over(ours: &Path) -> io::Result<()> {
    let none = None::<&str>;
    Ok(mount(Some(ours), KERNEL, none, MsFlags::MS_BIND, none)?)
}

/// Mounts a copy of the kernel's boot id over it, so that a restore only has to write a file.
///
/// # Errors
/// Not permitted.
pub fn prepare(agent: &Agent) -> io::Result<()> {
    let ours = agent.path(OURS);
    if ours.exists() {
        return Ok(());
    }
    fs::create_dir_all(agent.path("/run/rethaw"))?;
    fs::copy(KERNEL, &ours)?;
    mount_over(&ours)
}
