//! The wall clock shows the host's time.

use super::proof::{Context, Item, ItemError, Reading};

/// Largest difference between what was set and what is read right after; an emulated machine may
/// be held up between the two.
const TOLERANCE_NANOS: i64 = 20_000_000;
const RESIDUAL: &str = "residual_nanos";

/// The item.
#[derive(Debug)]
pub struct Clock;

impl Item for Clock {
    fn name(&self) -> &'static str {
        "clock"
    }

    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError> {
        let offset = context.host.offset().map_err(ItemError::io("read the clocks"))?;
        let mut reading = Reading::of(offset.nanos.to_string());
        reading.details.insert(RESIDUAL.to_owned(), offset.nanos.to_string());
        Ok(reading)
    }

    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        context.host.set().map(drop).map_err(ItemError::io("set the clock"))
    }

    fn check(&self, _: &Context<'_>, _old: &Reading, new: &Reading) -> Result<(), ItemError> {
        match new.value.parse::<i64>() {
            Ok(nanos) if nanos.abs() <= TOLERANCE_NANOS => Ok(()),
            _ => Err(ItemError::Mismatch {
                wanted: format!("within {TOLERANCE_NANOS} ns of the host"),
                got: format!("{} ns off", new.value),
            }),
        }
    }
}
