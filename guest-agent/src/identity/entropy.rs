//! The kernel's random number generator takes a new key.
//!
//! The key itself cannot be read. What can be had is the kernel's word for both requests and two
//! samples of its output, which is what this item reports; that two clones differ from the first
//! sample on is shown from outside, by restoring twice.

use super::proof::{Context, Item, ItemError, Reading};
use super::ready;
use crate::agent::Agent;
use std::fs::File;
use std::io;
use std::rc::Rc;

/// The item.
#[derive(Debug)]
pub struct Entropy {
    generator: io::Result<Rc<File>>,
    reseeded: bool,
}

impl Entropy {
    /// The item.
    pub fn new(agent: &Agent) -> Self {
        Self { generator: ready::random(agent), reseeded: false }
    }
}

impl Item for Entropy {
    fn name(&self) -> &'static str {
        "entropy"
    }

    fn read(&self, _context: &Context<'_>) -> Result<Reading, ItemError> {
        let mut sample = [0u8; 32];
        crate::random::fill(&mut sample).map_err(ItemError::io("getrandom"))?;
        let mut reading = Reading::of(hex::encode(sample));
        if self.reseeded {
            let proof = "RNDADDENTROPY and RNDRESEEDCRNG accepted; getrandom samples differ";
            reading.details.insert("read_back".to_owned(), proof.to_owned());
        }
        Ok(reading)
    }

    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        let generator = self.generator.as_ref().map_err(ready::again);
        let seed = &context.request.entropy.0;
        let reseeded = generator.and_then(|generator| crate::entropy::reseed(generator, seed));
        reseeded.map_err(ItemError::io("reseed"))?;
        self.reseeded = true;
        Ok(())
    }

    fn check(&self, _: &Context<'_>, old: &Reading, new: &Reading) -> Result<(), ItemError> {
        if self.reseeded && old.value != new.value {
            return Ok(());
        }
        Err(ItemError::Mismatch {
            wanted: "a reseeded generator".to_owned(),
            got: format!("reseeded: {}, samples equal: {}", self.reseeded, old.value == new.value),
        })
    }
}
