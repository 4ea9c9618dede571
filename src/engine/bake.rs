//! Makes the template `base`: guest image, cold boot, freeze, one trial restore that proves the
//! snapshot and records its working set, and only then publication.

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_agent::client::AgentError;
use guest_agent::wire::{ExecFrame, ExecRequest};
use sha2::{Digest, Sha256};
use snapshotter::golden::{self, BakeError, GoldenSpec, Step};
use snapshotter::image::{GuestImage, ImageError};
use snapshotter::manifest::{FORMAT, Manifest, ManifestError, WORKING_SET};

use super::db::{DbError, TemplateRow};
use super::lifecycle::{self, RestoreError, RunDir};
use super::template::{BASE, ReadyTemplate, Template, TemplateState};
use super::workspace::WorkspaceError;
use super::{Engine, ids, lint};

/// What a clone is expected to do first; its pages are the working set.
const FIRST_COMMANDS: &[&[&str]] = &[&["/bin/true"], &["python3", "-c", "print(6 * 7)"]];
const FIRST_COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// Why `base` could not be made.
#[derive(Debug, thiserror::Error)]
enum BaseError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Bake(#[from] BakeError),
    #[error("trial restore: {0}")]
    Trial(#[from] RestoreError),
    #[error("trial command {command:?}: {problem}")]
    TrialCommand { command: &'static str, problem: String },
    #[error(transparent)]
    Lint(#[from] lint::LintError),
    #[error("working set: {0}")]
    WorkingSet(String),
    #[error(transparent)]
    Publish(#[from] WorkspaceError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(transparent)]
    Db(#[from] DbError),
    #[error("VM directory: {0}")]
    RunDir(std::io::Error),
}

impl Engine {
    /// Sees to it that `base` is ready and has a pool. A failure is kept in the template's status,
    /// where `/readyz` and the API show it.
    pub(super) async fn ensure_base(self: Arc<Self>) {
        let template = Arc::new(Template::queued(BASE));
        self.templates.insert(BASE.to_owned(), Arc::clone(&template));
        let started = Instant::now();
        match self.make_base(&template).await {
            Ok(ready) => {
                tracing::info!(snapshot = %ready.snapshot, took = ?started.elapsed(), "base is ready");
                template.update(|s| {
                    s.state = TemplateState::Ready;
                    s.message = "ready".to_owned();
                    s.ready = Some(Arc::clone(&ready));
                });
                if let Err(e) = self.open_pool(ready).await {
                    tracing::error!("pool of base: {e}");
                }
            }
            Err(e) => {
                tracing::error!("base cannot be made: {e}");
                template.update(|s| {
                    s.state = TemplateState::Failed;
                    s.error = Some(e.to_string());
                });
            }
        }
        if let Err(e) = self.note_template(&template).await {
            tracing::error!("{e}");
        }
    }

    async fn make_base(&self, template: &Template) -> Result<Arc<ReadyTemplate>, BaseError> {
        let progress = |line: &str| {
            tracing::info!("{line}");
            template.update(|s| s.message = line.to_owned());
        };
        let (home, agent) = (&self.config.home, &self.config.agent_binary);
        let image = GuestImage::ensure(home, agent, self.config.flavor, progress).await?;
        let id = self.base_snapshot_id(&image);
        if self.store.dir(&id).exists() {
            let manifest = self.store.manifest(&id)?;
            manifest.check(&self.store.dir(&id), self.context.driver.compat())?;
            return Ok(self.resolve(manifest, &image));
        }
        let manifest = self.bake(&id, &image, template).await?;
        Ok(self.resolve(manifest, &image))
    }

    /// The same image on the same VMM and machine is the same template: the id says so.
    fn base_snapshot_id(&self, image: &GuestImage) -> String {
        let compat = self.context.driver.compat();
        let facts: Vec<String> = compat.facts.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let size = self.config.size;
        let text = format!(
            "format {FORMAT}\nimage {}\nvmm {}\n{}\nvcpus {}\nmemory {}\n",
            image.key,
            compat.vmm.as_str(),
            facts.join("\n"),
            size.vcpus,
            size.memory_bytes
        );
        hex::encode(Sha256::digest(text))[..20].to_owned()
    }

    fn resolve(&self, manifest: Manifest, image: &GuestImage) -> Arc<ReadyTemplate> {
        let dir = self.store.dir(&manifest.id);
        Arc::new(ReadyTemplate::new(BASE, &dir, manifest, image.rootfs.clone()))
    }

    async fn bake(
        &self,
        id: &str,
        image: &GuestImage,
        template: &Template,
    ) -> Result<Manifest, BaseError> {
        let vm_id = ids::new_id();
        let run_dir = RunDir::create(&self.context.run, &vm_id).map_err(BaseError::RunDir)?;
        let spec = GoldenSpec {
            id: id.to_owned(),
            image,
            size: self.config.size,
            run_dir: run_dir.path(),
        };
        let started = Instant::now();
        let progress = |step: Step| {
            let (state, message) = match step {
                Step::Booting => (TemplateState::Booting, "booting the golden VM"),
                Step::Settling => (TemplateState::Settling, "settling"),
                Step::Snapshotting => (TemplateState::Snapshotting, "writing the snapshot"),
            };
            tracing::info!(at = ?started.elapsed(), "{message}");
            template.update(|s| {
                s.state = state;
                s.message = message.to_owned();
            });
        };
        let driver = &*self.context.driver;
        let frozen = golden::freeze(driver, &self.store, &spec, progress).await;
        let (draft, manifest) = frozen?;
        drop(run_dir);
        template.update(|s| s.message = "trying the snapshot".to_owned());
        self.trial(draft.dir(), &manifest, image).await?;
        Ok(self.publish(draft, manifest).await?)
    }

    /// Restores the unpublished snapshot once, runs what users run first, and keeps the pages that
    /// took as the working set.
    async fn trial(
        &self,
        draft: &std::path::Path,
        manifest: &Manifest,
        image: &GuestImage,
    ) -> Result<(), BaseError> {
        let mut trial = ReadyTemplate::new(BASE, draft, manifest.clone(), image.rootfs.clone());
        trial.memory = golden::memory_plan(draft, true);
        let vm = lifecycle::restore(&self.context, &trial, None).await?;
        let id = vm.id.clone();
        let recorded = async {
            for argv in FIRST_COMMANDS {
                self.trial_command(&vm, argv).await?;
            }
            let set = self.pager.recording(&id);
            let set = set.map_err(|e| BaseError::WorkingSet(e.to_string()))?;
            let saved = set.save(&draft.join(WORKING_SET));
            saved.map_err(|e| BaseError::WorkingSet(e.to_string()))?;
            // After the recording: no clone does this first.
            Ok(lint::check(&vm.machine.agent).await?)
        };
        let recorded = recorded.await;
        vm.machine.destroy().await;
        self.context.db.vm_gone(&id).await?;
        recorded
    }

    async fn trial_command(
        &self,
        vm: &lifecycle::Reidentified,
        argv: &'static [&'static str],
    ) -> Result<(), BaseError> {
        let problem = |problem: String| BaseError::TrialCommand { command: argv[0], problem };
        let request = ExecRequest {
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            ..ExecRequest::default()
        };
        let run = async {
            let mut stream = vm.machine.agent.exec(&request, FIRST_COMMAND_DEADLINE).await?;
            loop {
                match stream.next_frame().await? {
                    Some(ExecFrame::Exit(exit)) if exit.code == 0 => return Ok(Ok(())),
                    Some(ExecFrame::Exit(exit)) => return Ok(Err(format!("exit {}", exit.code))),
                    Some(ExecFrame::Error(e)) => return Ok(Err(e.message)),
                    Some(_) => {}
                    None => return Ok(Err("ended without an exit".to_owned())),
                }
            }
        };
        match tokio::time::timeout(FIRST_COMMAND_DEADLINE, run).await {
            Err(_) => Err(problem("no end in time".to_owned())),
            Ok(Err::<Result<(), String>, AgentError>(e)) => Err(problem(e.to_string())),
            Ok(Ok(done)) => done.map_err(problem),
        }
    }

    async fn note_template(&self, template: &Template) -> Result<(), DbError> {
        let status = template.status();
        let format = &time::format_description::well_known::Rfc3339;
        let row = TemplateRow {
            name: template.name.clone(),
            snapshot: status.ready.map(|r| r.snapshot.clone()),
            state: status.state.as_str().to_owned(),
            spec: "{}".to_owned(),
            error: status.error,
            created_at: template.created_at.format(format).unwrap_or_default(),
        };
        self.context.db.template_put(row).await
    }
}
