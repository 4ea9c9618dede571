//! The name of this identity, where programs that care can watch it.

use super::proof::{Context, Item, ItemError, Reading};
use super::write;
use std::fs;

const DIR: &str = "/run/rethaw";
const GENERATION: &str = "/run/rethaw/generation";

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

    async fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        fs::create_dir_all(context.agent.path(DIR)).map_err(ItemError::io("make /run/rethaw"))?;
        let contents = format!("{}\n", context.request.generation);
        write::replace(&context.agent.path(GENERATION), &contents, 0o644)
    }

    fn check(&self, context: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        ItemError::compare(&context.request.generation, &new.value)
    }
}
