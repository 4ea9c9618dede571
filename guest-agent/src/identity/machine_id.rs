//! The machine id, and D-Bus's, which is a link to it. No tool is used: systemd's would keep an id
//! that is valid.

use super::proof::{Context, Item, ItemError, Reading};
use super::write;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;

const MACHINE_ID: &str = "/etc/machine-id";
const DBUS: &str = "/var/lib/dbus/machine-id";

/// The item.
#[derive(Debug)]
pub struct MachineId;

impl Item for MachineId {
    fn name(&self) -> &'static str {
        "machine_id"
    }

    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError> {
        let id = write::read(&context.agent.path(MACHINE_ID))?;
        let dbus = match fs::read_link(context.agent.path(DBUS)) {
            // A link of this kind holds the same id by itself; it need not be followed.
            Ok(target) if target == std::path::Path::new(MACHINE_ID) => id.clone(),
            Ok(_) => write::read(&context.agent.path(DBUS))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => id.clone(),
            Err(_) => write::read(&context.agent.path(DBUS))?,
        };
        Ok(Reading::of(format!("{}\n{}", id.trim_end(), dbus.trim_end())))
    }

    async fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        let contents = format!("{}\n", context.request.machine_id);
        write::replace(&context.agent.path(MACHINE_ID), &contents, 0o444)?;
        let dbus = context.agent.path(DBUS);
        let is_file = fs::symlink_metadata(&dbus).is_ok_and(|m| m.is_file());
        if is_file {
            let io = |what: &str| ItemError::io(format!("{what} {}", dbus.display()));
            fs::remove_file(&dbus).map_err(io("remove"))?;
            symlink(MACHINE_ID, &dbus).map_err(io("link"))?;
        }
        Ok(())
    }

    fn check(&self, context: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        let id = &context.request.machine_id;
        ItemError::compare(&format!("{id}\n{id}"), &new.value)
    }
}
