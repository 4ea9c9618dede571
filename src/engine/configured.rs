//! Templates that the operator wants the service to have: seen to at every start, without anything
//! being asked of the API.
//!
//! What is there already and made of the same stays. The rest is listed at once and built in the
//! background, one by one. When a template's parent turns out to be another snapshot than the one it
//! was made from, the template is made anew, too: that is known only once the parent is ready.

use std::collections::HashSet;
use std::sync::Arc;

use super::Engine;
use super::build::{Kind, Spec};
use super::db::DbError;
use super::template::{ReadyTemplate, Template, TemplateState};
use super::templates::stop_build;

/// A template to have.
#[derive(Debug, Clone, PartialEq)]
pub struct Configured {
    /// Its name.
    pub name: String,
    /// What it is made of.
    pub spec: Spec,
    /// The archives that its steps copy.
    pub archives: Vec<Vec<u8>>,
}

impl Engine {
    /// Sees to it that these templates come to be, each of them behind the one it starts from. One
    /// that cannot be made says so itself.
    pub async fn configure_templates(
        self: &Arc<Self>,
        wanted: Vec<Configured>,
    ) -> Result<(), DbError> {
        let mut specs = Vec::new();
        let mut begun = HashSet::new();
        for Configured { name, spec, archives } in wanted {
            let kept = self.keep_archives(archives).await;
            let there = self.template(&name);
            let reason = match there.as_ref().map(|t| (t.spec.as_ref(), t.status().state)) {
                None => Some("it is not there"),
                Some((Some(same), TemplateState::Failed)) if *same == spec => Some("it failed"),
                Some((Some(same), _)) if *same == spec => None,
                Some(_) => Some("it was made of something else"),
            };
            if let Some(reason) = reason {
                begun.insert(name.clone());
                match kept {
                    Ok(()) => self.replace_template(&name, spec.clone(), reason).await.map(drop)?,
                    Err(e) => self.list_failed(&name, spec.clone(), &e).await?,
                }
            } else if let Err(e) = kept {
                tracing::warn!(template = name, "what it copies is not kept: {e}");
            }
            specs.push((name, spec));
        }
        let engine = Arc::clone(self);
        self.spawn(async move { engine.follow_parents(specs, begun).await });
        Ok(())
    }

    async fn keep_archives(&self, archives: Vec<Vec<u8>>) -> Result<(), String> {
        self.require_room(0).map_err(|e| e.to_string())?;
        for archive in archives {
            let kept = self.inputs.keep(archive, self.room()).await;
            kept.map_err(|e| format!("what it copies cannot be kept: {e}"))?;
        }
        Ok(())
    }

    async fn list_failed(&self, name: &str, spec: Spec, error: &str) -> Result<(), DbError> {
        tracing::warn!(template = name, "not built: {error}");
        let template = self.list_template(name, spec).await?;
        template.log.write(Kind::End, None, &format!("failed: {error}"));
        template.set_failed(error.to_owned(), None);
        let _ = template.build_ended.send_replace(true);
        self.note_template(&template, 0).await
    }

    /// Moves a name to a template that is yet to be built. Sandboxes of the one before live on, and
    /// its snapshot stays for as long as one of them, or another template, stands on it.
    async fn replace_template(
        self: &Arc<Self>,
        name: &str,
        spec: Spec,
        reason: &str,
    ) -> Result<Arc<Template>, DbError> {
        let _one_at_a_time = self.template_changes.lock().await;
        let before = self.template(name);
        // Not truncated: a build that is being stopped may still write to it.
        let _ = std::fs::remove_file(self.log_path(name));
        let template = self.list_template(name, spec).await?;
        tracing::info!(template = name, "to be built: {reason}");
        template.log.write(Kind::State, None, &format!("to be built: {reason}"));
        let (engine, built) = (Arc::clone(self), Arc::clone(&template));
        self.spawn(async move {
            if let Some(before) = &before
                && !stop_build(before).await
            {
                tracing::warn!(template = %before.name, "its build does not stop");
            }
            engine.close_pool(&built.name).await;
            Arc::clone(&engine).run_build(&built, 1).await;
            let old = before.and_then(|before| before.ready());
            if let (Some(old), Some(_)) = (old, built.ready()) {
                engine.drop_layer(&old.snapshot).await;
            }
        });
        Ok(template)
    }

    /// Makes those anew whose parent is not what they were made from, and those that an earlier
    /// service had begun and that failed for their parent's sake. Ends with the engine.
    async fn follow_parents(
        self: Arc<Self>,
        wanted: Vec<(String, Spec)>,
        mut begun: HashSet<String>,
    ) {
        for (name, spec) in wanted {
            let Some(parent) = self.parent_when_ready(&spec.from).await else { continue };
            let Some(template) = self.template(&name) else { continue };
            let _ = template.build_ended.subscribe().wait_for(|ended| *ended).await;
            // Deleted, or deleted and asked for with other steps, in the meantime: their wish.
            let same = self.template(&name).is_some_and(|now| Arc::ptr_eq(&now, &template));
            if !same || template.spec.as_ref() != Some(&spec) || begun.contains(&name) {
                continue;
            }
            let reason = match template.ready() {
                Some(ready) if ready.snapshot == spec.snapshot_id(&parent.snapshot) => continue,
                Some(_) => "the template it starts from changed",
                None => "it failed",
            };
            begun.insert(name.clone());
            if let Err(e) = self.replace_template(&name, spec, reason).await {
                tracing::error!(template = name, "{e}");
            }
        }
    }

    async fn parent_when_ready(&self, name: &str) -> Option<Arc<ReadyTemplate>> {
        let mut status = self.template(name)?.watch();
        let status = status.wait_for(|status| status.state.is_final()).await.ok()?;
        status.ready.clone()
    }
}
