//! systemd's saved seed: a clone must not feed its next boot with another clone's.

use super::proof::{Context, Item, ItemError, Reading};
use std::cell::Cell;
use std::fs;
use std::io;

const SEED: &str = "/var/lib/systemd/random-seed";

/// The item.
#[derive(Debug, Default)]
pub struct RandomSeed {
    /// It was not there when last looked for.
    absent: Cell<bool>,
}

impl Item for RandomSeed {
    fn name(&self) -> &'static str {
        "random_seed"
    }

    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError> {
        match fs::symlink_metadata(context.agent.path(SEED)) {
            Ok(_) => Ok(Reading::of("present")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.absent.set(true);
                Ok(Reading::of("absent"))
            }
            Err(error) => Err(ItemError::io(format!("look at {SEED}"))(error)),
        }
    }

    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        if self.absent.get() {
            return Ok(());
        }
        match fs::remove_file(context.agent.path(SEED)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(ItemError::io(format!("remove {SEED}"))(error))
            }
            _ => Ok(()),
        }
    }

    fn check(&self, _: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        ItemError::compare("absent", &new.value)
    }
}
