//! The boot id. The kernel's cannot be changed, so a file of ours is mounted over it; what the
//! kernel hands to fresh mounts of /proc stays the template's.

use super::proof::{Context, Item, ItemError, Reading};
use nix::mount::{MsFlags, mount};
use std::fs;

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
        let text = fs::read_to_string(KERNEL).map_err(ItemError::io("read boot_id"))?;
        Ok(Reading::of(text.trim_end()))
    }

    async fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        let ours = context.agent.path(OURS);
        let dir = context.agent.path("/run/rethaw");
        fs::create_dir_all(dir).map_err(ItemError::io("make /run/rethaw"))?;
        // Written in place: the file may be mounted already, from before or from an identity that
        // this machine's original was given.
        let contents = format!("{}\n", context.request.boot_id);
        fs::write(&ours, contents).map_err(ItemError::io("write our boot_id"))?;
        if self.read(context)?.value == context.request.boot_id {
            return Ok(());
        }
        let none = None::<&str>;
        mount(Some(&ours), KERNEL, none, MsFlags::MS_BIND, none)
            .map_err(|e| ItemError::io("mount our boot_id")(e.into()))
    }

    fn check(&self, context: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        ItemError::compare(&context.request.boot_id, &new.value)
    }
}
