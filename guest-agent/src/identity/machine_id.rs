//! The machine id, and D-Bus's, which is a link to it. No tool is used: systemd's would keep an id
//! that is valid.

use super::proof::{Context, Item, ItemError, Reading};
use super::write;
use crate::agent::Agent;
use std::cell::Cell;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;

const MACHINE_ID: &str = "/etc/machine-id";
const DBUS: &str = "/var/lib/dbus/machine-id";

/// The item.
#[derive(Debug, Default)]
pub struct MachineId {
    /// D-Bus's is a link, or not there.
    one_file: Cell<bool>,
}

impl Item for MachineId {
    fn name(&self) -> &'static str {
        "machine_id"
    }

    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError> {
        let id = write::read(&context.agent.path(MACHINE_ID))?;
        let dbus = match fs::read_link(context.agent.path(DBUS)) {
            // A link of this kind holds the same id by itself; it need not be followed.
            Ok(target) if target == std::path::Path::new(MACHINE_ID) => {
                self.one_file.set(true);
                id.clone()
            }
            Ok(_) => write::read(&context.agent.path(DBUS))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.one_file.set(true);
                id.clone()
            }
            Err(_) => write::read(&context.agent.path(DBUS))?,
        };
        Ok(Reading::of(format!("{}\n{}", id.trim_end(), dbus.trim_end())))
    }

    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        let contents = format!("{}\n", context.request.machine_id);
        write::update(&context.agent.path(MACHINE_ID), &contents, 0o444)?;
        if self.one_file.get() { Ok(()) } else { prepare(context.agent) }
    }

    fn check(&self, context: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        let id = &context.request.machine_id;
        ItemError::compare(&format!("{id}\n{id}"), &new.value)
    }
}

/// Makes D-Bus's id, where it is a file of its own, a link.
///
/// # Errors
/// The file system refuses.
pub fn prepare(agent: &Agent) -> Result<(), ItemError> {
    let dbus = agent.path(DBUS);
    if fs::symlink_metadata(&dbus).is_ok_and(|m| m.is_file()) {
        let io = |what: &str| ItemError::io(format!("{what} {}", dbus.display()));
        fs::remove_file(&dbus).map_err(io("remove"))?;
        symlink(MACHINE_ID, &dbus).map_err(io("link"))?;
    }
    Ok(())
}
