//! Makes the template `base`: guest image, cold boot, freeze, one trial restore that proves the
//! snapshot and records its working set, and only then publication.

use std::sync::Arc;
use std::time::Instant;

use sha2::{Digest, Sha256};
use snapshotter::golden::{self, BakeError, GoldenSpec, Step};
use snapshotter::image::{GuestImage, ImageError};
use snapshotter::manifest::{FORMAT, Manifest, ManifestError};

use super::build::BuildLog;
use super::machine::RunDir;
use super::template::{BASE, ReadyTemplate, Template, TemplateState};
use super::trial::TrialError;
use super::workspace::WorkspaceError;
use super::{Engine, ids};

/// Why `base` could not be made.
#[derive(Debug, thiserror::Error)]
enum BaseError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Bake(#[from] BakeError),
    #[error(transparent)]
    Trial(#[from] TrialError),
    #[error(transparent)]
    Publish(#[from] WorkspaceError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("VM directory: {0}")]
    RunDir(std::io::Error),
}

impl Engine {
    /// Lists `base`, which is yet to be made.
    pub(super) fn add_base(&self) -> Arc<Template> {
        let log = BuildLog::ended(&self.config.home.join("builds").join("base.ndjson"));
        let base = Template::queued(BASE, None, time::OffsetDateTime::now_utc(), log);
        let base = Arc::new(base);
        self.templates.insert(BASE.to_owned(), Arc::clone(&base));
        base
    }

    /// Sees to it that `base` is ready and has a pool. A failure is kept in the template's status,
    /// where `/readyz` and the API show it.
    pub(super) async fn ensure_base(self: Arc<Self>, template: Arc<Template>) {
        let started = Instant::now();
        let made = self.make_base(&template).await;
        match made {
            Ok(ready) => {
                tracing::info!(snapshot = %ready.snapshot, took = ?started.elapsed(), "base is ready");
                template.set_ready(Arc::clone(&ready), false);
                if let Err(e) = self.open_pool(ready).await {
                    tracing::error!("pool of base: {e}");
                }
            }
            Err(e) => {
                tracing::error!("base cannot be made: {e}");
                template.set_failed(e.to_string(), None);
            }
        }
        if let Err(e) = self.note_template(&template, 0).await {
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
        let rootfs = image.rootfs.clone();
        let unpublished = ReadyTemplate::new(BASE, draft.dir(), manifest.clone(), rootfs);
        self.trial(&unpublished, draft.dir(), None).await?;
        Ok(self.publish(draft, manifest).await?)
    }
}
