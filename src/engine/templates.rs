//! Templates as users ask for them: building, deleting, and finding them again after a start.

use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::Engine;
use super::budget::NoRoom;
use super::build::{BuildLog, Kind, MAX_ATTEMPTS, Spec};
use super::db::{DbError, TemplateRow};
use super::sandbox::State;
use super::template::{BASE, Template, TemplateState};

/// How often a template's last use is written down.
const USE_NOTED_EVERY: time::Duration = time::Duration::MINUTE;
/// How long a build that was told to stop, or a pool, may take to end; each of their steps has a
/// shorter deadline of its own.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// Why a template is not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildRequestError {
    /// A field is not acceptable.
    #[error("{0}")]
    Invalid(String),
    /// There is another one with this name.
    #[error(
        "template {0:?} exists and is made of something else; delete it first or choose another name"
    )]
    Exists(String),
    /// There is no room.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The state database.
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Why a template was not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// There is none.
    #[error("no template {0:?}")]
    NotFound(String),
    /// Something needs it.
    #[error("template {name:?} is in use by {}", by.join(", "))]
    InUse {
        /// The template.
        name: String,
        /// What needs it.
        by: Vec<String>,
    },
    /// Its build did not stop.
    #[error("the build of {0:?} does not stop; try again")]
    Busy(String),
    /// The state database.
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Tells a template's build, if there is one, to stop; whether it did.
pub(super) async fn stop_build(template: &Template) -> bool {
    template.cancel.cancel();
    if template.spec.is_none() {
        return true;
    }
    let mut ended = template.build_ended.subscribe();
    let ended = ended.wait_for(|ended| *ended);
    tokio::time::timeout(END_DEADLINE, ended).await.is_ok()
}

impl Engine {
    /// Asks for a template. One of this name that is made of the same is given as it is; one that
    /// failed is tried again.
    pub async fn build_template(
        self: &Arc<Self>,
        name: &str,
        spec: Spec,
    ) -> Result<Arc<Template>, BuildRequestError> {
        let _one_at_a_time = self.template_changes.lock().await;
        let existing = self.template(name);
        if let Some(existing) = &existing {
            let failed = existing.status().state == TemplateState::Failed;
            match &existing.spec {
                Some(same) if *same == spec && !failed => return Ok(Arc::clone(existing)),
                Some(_) if failed => {}
                _ => return Err(BuildRequestError::Exists(name.to_owned())),
            }
        }
        let invalid = |message: String| Err(BuildRequestError::Invalid(message));
        let from = &spec.from;
        match self.template(from).map(|parent| parent.status()) {
            None => return invalid(format!("from: there is no template {from:?}")),
            Some(_) if from == name => {
                return invalid("from: a template cannot start from itself".to_owned());
            }
            Some(status) if status.state == TemplateState::Failed => {
                let error = status.error.unwrap_or_default();
                return invalid(format!("from: template {from:?} failed: {error}"));
            }
            Some(_) => {}
        }
        if let Some(missing) = spec.inputs().find(|sha256| !self.inputs.has(sha256)) {
            return invalid(format!(
                "steps: no archive {missing} was uploaded; PUT it to /v1/inputs/{missing} first"
            ));
        }
        self.require_room(0)?;
        let template = self.list_template(name, spec).await?;
        self.enqueue(Arc::clone(&template), 1);
        Ok(template)
    }

    /// Lists a template that is to be built, in place of what has its name.
    pub(super) async fn list_template(
        &self,
        name: &str,
        spec: Spec,
    ) -> Result<Arc<Template>, DbError> {
        let log = BuildLog::create(&self.log_path(name));
        let now = OffsetDateTime::now_utc();
        let template = Arc::new(Template::queued(name, Some(spec), now, log));
        self.note_template(&template, 0).await?;
        self.templates.insert(name.to_owned(), Arc::clone(&template));
        Ok(template)
    }

    /// Where a template's build log is.
    pub(super) fn log_path(&self, name: &str) -> std::path::PathBuf {
        self.config.home.join("builds").join(format!("{name}.ndjson"))
    }

    /// Removes a template that nothing needs; a build under way is stopped first.
    pub async fn delete_template(self: &Arc<Self>, name: &str) -> Result<(), DeleteError> {
        let engine = Arc::clone(self);
        let name = name.to_owned();
        // Done to its end also if the caller goes away.
        match tokio::spawn(async move { engine.delete_template_now(&name).await }).await {
            Ok(done) => done,
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }

    async fn delete_template_now(self: &Arc<Self>, name: &str) -> Result<(), DeleteError> {
        let _one_at_a_time = self.template_changes.lock().await;
        let template = self.template(name).ok_or_else(|| DeleteError::NotFound(name.to_owned()))?;
        let in_use = |by: Vec<String>| Err(DeleteError::InUse { name: name.to_owned(), by });
        let users = self.users_of(name);
        if !users.is_empty() {
            return in_use(users);
        }
        if !stop_build(&template).await {
            return Err(DeleteError::Busy(name.to_owned()));
        }
        // Nobody finds it from here on; a claim that has found it shows in what it holds.
        self.templates.remove(name);
        let snapshot = template.ready().map(|ready| ready.snapshot.clone());
        let held = snapshot.as_ref().is_some_and(|s| self.is_pinned(s));
        let users = self.users_of(name);
        if held || !users.is_empty() {
            self.templates.insert(name.to_owned(), template);
            let claim = held.then(|| "a sandbox that is being made".to_owned());
            return in_use(users.into_iter().chain(claim).collect());
        }
        self.close_pool(name).await;
        self.context.db.template_gone(name).await?;
        crate::failpoint::reached("template.forgotten").await;
        let _ = std::fs::remove_file(template.log.path());
        if let Some(snapshot) = snapshot {
            self.drop_layer(&snapshot).await;
        }
        tracing::info!(template = name, "template gone");
        Ok(())
    }

    /// Removes a template's snapshot if nothing stands on it any more.
    pub(super) async fn drop_layer(&self, snapshot: &str) {
        if !self.needed_snapshots().contains(snapshot) {
            self.remove_stored(snapshot).await;
        }
    }

    /// Closes a template's pool and waits for its VMs to be gone.
    pub(super) async fn close_pool(&self, name: &str) {
        if let Some((_, pool)) = self.pools.remove(name) {
            pool.close();
            if tokio::time::timeout(END_DEADLINE, pool.ended()).await.is_err() {
                tracing::warn!(template = name, "its pool does not end");
            }
        }
    }

    /// What stands in the way of a template's end.
    fn users_of(&self, name: &str) -> Vec<String> {
        let mut users = Vec::new();
        if name == BASE {
            users.push("the service, which always has it".to_owned());
        }
        for sandbox in self.sandboxes() {
            let data = sandbox.data();
            if data.template == name {
                let paused = sandbox.state() == State::Paused;
                let kind = if paused { "paused sandbox" } else { "sandbox" };
                users.push(format!("{kind} {}", data.id));
            }
        }
        let of_it = self.snapshots().into_iter().filter(|snapshot| snapshot.template == name);
        users.extend(of_it.map(|snapshot| format!("snapshot {}", snapshot.id)));
        let child = |t: &Template| {
            let alive = t.status().state != TemplateState::Failed;
            alive && t.spec.as_ref().is_some_and(|spec| spec.from == name)
        };
        let children = self.templates().into_iter().filter(|t| child(t));
        users.extend(children.map(|t| format!("template {}", t.name)));
        users
    }

    /// Names of the templates a template was made from, the first one first, itself last.
    pub fn lineage(&self, template: &Template) -> Vec<String> {
        let mut names = vec![template.name.clone()];
        let mut parent = template.spec.as_ref().map(|spec| spec.from.clone());
        // No longer than there are templates: names could form a circle after a failed build.
        while let Some(name) = parent.take()
            && !names.contains(&name)
        {
            let next = self.template(&name);
            names.push(name);
            parent = next.and_then(|t| t.spec.as_ref().map(|spec| spec.from.clone()));
        }
        names.reverse();
        names
    }

    /// Notes that a template is used now.
    pub(super) fn touch(&self, template: &Template) {
        let now = OffsetDateTime::now_utc();
        let last = template.last_used();
        template.set_last_used(Some(now));
        if last.is_some_and(|last| now - last < USE_NOTED_EVERY) {
            return;
        }
        let (db, name) = (self.context.db.clone(), template.name.clone());
        let text = now.format(&Rfc3339).unwrap_or_default();
        self.spawn(async move {
            if let Err(e) = db.template_used(&name, &text).await {
                tracing::warn!(template = %name, "its last use is not noted: {e}");
            }
        });
    }

    /// Writes a template as it is now.
    pub(super) async fn note_template(
        &self,
        template: &Template,
        attempts: u32,
    ) -> Result<(), DbError> {
        let snapshot = template.ready().map(|ready| ready.snapshot.clone());
        self.note(template, snapshot, attempts).await
    }

    /// Writes which snapshot a build is about to publish.
    pub(super) async fn note_build(
        &self,
        template: &Template,
        snapshot: &str,
        attempts: u32,
    ) -> Result<(), DbError> {
        self.note(template, Some(snapshot.to_owned()), attempts).await
    }

    async fn note(
        &self,
        template: &Template,
        snapshot: Option<String>,
        attempts: u32,
    ) -> Result<(), DbError> {
        let status = template.status();
        let json = |what, text: Result<String, _>| {
            text.map_err(|source| DbError::Malformed { what, source })
        };
        let spec = template.spec.as_ref().map(serde_json::to_string);
        let failure = status.failure.as_ref().map(serde_json::to_string);
        let row = TemplateRow {
            name: template.name.clone(),
            snapshot,
            state: status.state.as_str().to_owned(),
            spec: spec.map_or(Ok("{}".to_owned()), |text| json("build", text))?,
            error: status.error,
            failure: failure.map(|text| json("failure", text)).transpose()?,
            attempts,
            created_at: template.created_at.format(&Rfc3339).unwrap_or_default(),
            last_used: None,
        };
        self.context.db.template_put(row).await
    }

    /// Finds the templates an earlier service had; builds that it did not finish are done again.
    pub(super) async fn load_templates(self: &Arc<Self>) -> Result<(), DbError> {
        let rows = self.context.db.templates().await?;
        let known = rows.iter().filter_map(|row| row.snapshot.clone()).collect();
        for row in rows {
            if row.name == BASE {
                if let Some(base) = self.template(BASE) {
                    base.set_last_used(row.last_used());
                }
                continue;
            }
            self.load_template(row).await?;
        }
        self.drop_unknown_layers(&known);
        Ok(())
    }

    async fn load_template(self: &Arc<Self>, row: TemplateRow) -> Result<(), DbError> {
        let (name, state) = (row.name.clone(), TemplateState::parse(&row.state));
        let path = self.log_path(&name);
        let log = match state.is_final() {
            true => BuildLog::ended(&path),
            false => BuildLog::create(&path),
        };
        let malformed = |what| move |source| DbError::Malformed { what, source };
        let spec: Spec = serde_json::from_str(&row.spec).map_err(malformed("build"))?;
        let created_at = OffsetDateTime::parse(&row.created_at, &Rfc3339);
        let created_at = created_at.unwrap_or_else(|_| OffsetDateTime::now_utc());
        let template = Arc::new(Template::queued(&name, Some(spec), created_at, log));
        template.set_last_used(row.last_used());
        self.templates.insert(name.clone(), Arc::clone(&template));
        let snapshot = row.snapshot.unwrap_or_default();
        match state {
            TemplateState::Ready => {
                let _ = template.build_ended.send_replace(true);
                match self.resolve_workspace(&name, &snapshot) {
                    Ok(ready) => {
                        let ready = Arc::new(ready);
                        template.set_ready(Arc::clone(&ready), false);
                        self.open_pool(ready).await?;
                    }
                    // Not noted: another host, or the VMM of before, may have use for it.
                    Err(e) => template.set_failed(format!("{e}; build it again"), None),
                }
            }
            TemplateState::Failed => {
                let _ = template.build_ended.send_replace(true);
                let failure = row.failure.and_then(|text| serde_json::from_str(&text).ok());
                template.set_failed(row.error.unwrap_or_default(), failure);
            }
            _ if row.attempts >= MAX_ATTEMPTS => {
                let error = format!("the service ended {} times during this build", row.attempts);
                template.log.write(Kind::End, None, &format!("failed: {error}"));
                let _ = template.build_ended.send_replace(true);
                template.set_failed(error, None);
                self.note_template(&template, row.attempts).await?;
            }
            _ => {
                tracing::info!(template = %name, attempt = row.attempts + 1, "building it again");
                self.enqueue(template, row.attempts + 1);
            }
        }
        Ok(())
    }
}
