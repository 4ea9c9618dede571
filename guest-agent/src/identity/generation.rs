//! The name of this identity, where programs that care can watch it.

use super::proof::{Context, Item, ItemError, Reading};
use super::write;
use crate::agent::Agent;
use std::fs;

const GENERATION: &str = "/run/rethaw/generation";

/// What the file holds in a template: nobody's.
const NONE: &str = "00000000-0000-0000-0000-000000000000\n";

/// Makes the file, so that a clone has only to change it.
///
/// # Errors
/// `/run` cannot be written.
pub fn prepare(agent: &Agent) -> Result<(), ItemError> {
    let folder = agent.path("/run/rethaw");
    fs::create_dir_all(&folder).map_err(ItemError::io(format!("make {}", folder.display())))?;
    write::update(&agent.path(GENERATION), NONE, 0o644)
}

/// The item.
#[derive(Debug)]
pub struct Generation;

impl Item for Generation {
    fn name(&self) -> &'static str {
        "generation"
    }

    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError> {
        let text = write::read(&context.agent.path(GENERATION))?;
        Ok(Reading::of(text.trim_end()))
    }

    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        let contents = format!("{}\n", context.request.generation);
        write::update(&context.agent.path(GENERATION), &contents, 0o644)
    }

    fn check(&self, context: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        ItemError::compare(&context.request.generation, &new.value)
    }
}
