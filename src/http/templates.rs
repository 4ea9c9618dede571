//! `/v1/templates`: what sandboxes can be made from.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use snapshotter::manifest::BootTimings;
use time::OffsetDateTime;

use super::App;
use super::error::ApiError;
use crate::engine::template::{Template, TemplateState};

/// A template as the API shows it.
#[derive(Debug, Serialize)]
pub struct TemplateView {
    name: String,
    state: TemplateState,
    message: String,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<SnapshotView>,
}

#[derive(Debug, Serialize)]
struct SnapshotView {
    id: String,
    parent: Option<String>,
    vcpus: u32,
    memory_bytes: u64,
    /// Apparent size of all files.
    bytes: u64,
    /// What they take on disk.
    allocated_bytes: u64,
    image: String,
    boot_ms: Option<BootTimings>,
}

impl TemplateView {
    fn new(template: &Template) -> Self {
        let status = template.status();
        let snapshot = status.ready.map(|ready| {
            let m = &ready.manifest;
            SnapshotView {
                id: m.id.clone(),
                parent: m.parent.clone(),
                vcpus: m.size.vcpus,
                memory_bytes: m.size.memory_bytes,
                bytes: m.files.values().map(|f| f.bytes).sum(),
                allocated_bytes: m.files.values().map(|f| f.allocated_bytes).sum(),
                image: m.image.clone(),
                boot_ms: m.boot.clone(),
            }
        });
        Self {
            name: template.name.clone(),
            state: status.state,
            message: status.message,
            created_at: template.created_at,
            error: status.error,
            snapshot,
        }
    }
}

#[derive(Debug, Serialize)]
pub struct ListReply {
    items: Vec<TemplateView>,
    next_token: Option<String>,
}

/// `GET /v1/templates`
pub async fn list(State(app): State<App>) -> Json<ListReply> {
    let items = app.engine.templates().iter().map(|t| TemplateView::new(t)).collect();
    Json(ListReply { items, next_token: None })
}

/// `GET /v1/templates/{name}`
pub async fn get(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<TemplateView>, ApiError> {
    let template = app.engine.template(&name);
    let template = template.ok_or_else(|| ApiError::template_not_found(&name))?;
    Ok(Json(TemplateView::new(&template)))
}
