//! Last of all: the workload may run.

use super::proof::{Context, Item, ItemError, Reading};

/// The item.
#[derive(Debug)]
pub struct Thaw;

impl Item for Thaw {
    fn name(&self) -> &'static str {
        "thaw"
    }

    fn not_applicable(&self, context: &Context<'_>) -> Option<String> {
        (!context.agent.workload.is_available()).then(|| "no cgroup v2".to_owned())
    }

    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError> {
        let frozen = context.agent.workload.is_frozen();
        let frozen = frozen.map_err(ItemError::io("read the workload's state"))?;
        Ok(Reading::of(if frozen { "frozen" } else { "running" }))
    }

    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        context.agent.workload.thaw().map_err(ItemError::io("thaw the workload"))
    }

    fn check(&self, _: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        ItemError::compare("running", &new.value)
    }
}
