//! The access token: the one of the request, or none, but never another machine's.

use super::proof::{Context, Item, ItemError, Reading};
use super::write;
use crate::token;

/// The item.
#[derive(Debug)]
pub struct Token;

impl Item for Token {
    fn name(&self) -> &'static str {
        "token"
    }

    fn read(&self, context: &Context<'_>) -> Result<Reading, ItemError> {
        let text = write::read(&context.agent.path(token::PATH))?;
        Ok(Reading::of(text.trim_end()))
    }

    fn apply(&mut self, context: &Context<'_>) -> Result<(), ItemError> {
        let token = context.request.access_token.as_deref();
        token::store(context.agent, token).map_err(ItemError::io("keep the token"))
    }

    fn check(&self, context: &Context<'_>, _: &Reading, new: &Reading) -> Result<(), ItemError> {
        if new.value == context.request.access_token.as_deref().unwrap_or("") {
            return Ok(());
        }
        // The values are secrets.
        let (wanted, got) = ("the request's token".to_owned(), "another".to_owned());
        Err(ItemError::Mismatch { wanted, got })
    }
}
