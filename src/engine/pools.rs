//! The pools of all templates: opened when a template is ready, found by claims, set by operators.

use std::sync::Arc;

use super::Engine;
use super::db::DbError;
use super::pool::{Pool, PoolNumbers};
use super::sandbox::{Sandbox, State};
use super::template::{BASE, ReadyTemplate};
use crate::live;

impl Engine {
    /// Every pool's template and numbers, and how many of its sandboxes are claimed.
    pub fn pools(&self) -> Vec<(String, PoolNumbers, u32)> {
        let mut all: Vec<_> = self
            .pools
            .iter()
            .map(|p| (p.key().clone(), p.value().numbers(), self.claimed(p.key())))
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// Every pool's numbers by its template, without a look at the sandboxes.
    pub fn pool_numbers(&self) -> Vec<(String, PoolNumbers)> {
        self.pools.iter().map(|p| (p.key().clone(), p.value().numbers())).collect()
    }

    /// The pool of just this template: its name may stand for another snapshot by now.
    pub(super) fn pool_of(&self, template: &ReadyTemplate) -> Option<Arc<Pool>> {
        let pool = self.pools.get(&template.name).map(|p| Arc::clone(p.value()));
        pool.filter(|pool| pool.template.snapshot == template.snapshot)
    }

    fn claimed(&self, template: &str) -> u32 {
        let of = |s: &Sandbox| s.data().template == template && s.state() != State::Paused;
        self.sandboxes.iter().filter(|s| of(s.value())).count() as u32
    }

    /// Sets how many VMs of a template are kept parked; `None` if there is no such pool.
    pub async fn set_pool_target(
        &self,
        template: &str,
        target: u32,
    ) -> Result<Option<()>, DbError> {
        let Some(pool) = self.pools.get(template).map(|p| Arc::clone(p.value())) else {
            return Ok(None);
        };
        self.context.db.set_pool_target(template, target).await?;
        pool.set_target(target);
        Ok(Some(()))
    }

    /// Opens a template's pool and starts to fill it.
    pub(super) async fn open_pool(
        self: &Arc<Self>,
        ready: Arc<ReadyTemplate>,
    ) -> Result<(), DbError> {
        let target = self.context.db.pool_target(&ready.name).await?;
        // A parked VM costs memory, and any number of templates can be derived: one VM each, unless
        // an operator wants more.
        let most = if ready.name == BASE { u32::MAX } else { 1 };
        let target = target
            .or_else(|| self.config.pool_targets.get(&ready.name).copied())
            .unwrap_or(self.config.default_pool_target.min(most));
        let name = ready.name.clone();
        let pool = Pool::new(ready, self.context.clone(), target, self.claims.subscribe());
        self.pools.insert(name, Arc::clone(&pool));
        live::changed();
        self.spawn(pool.run());
        Ok(())
    }
}
