//! `/v1/templates`: what sandboxes can be made from.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use snapshotter::manifest::BootTimings;
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::App;
use super::error::ApiError;
use crate::engine::template::{Template, TemplateState};

/// A template
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Template)]
pub struct TemplateView {
    /// Its name
    name: String,
    /// How far it is
    state: TemplateState,
    /// What is being done, in words
    message: String,
    /// When it was asked for
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    /// Why it failed
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    /// What sandboxes are restored from, once it is ready
    snapshot: Option<SnapshotView>,
}

/// A published snapshot
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Snapshot)]
struct SnapshotView {
    /// Its id
    id: String,
    /// Snapshot it stands on
    parent: Option<String>,
    /// Processors of the machine
    vcpus: u32,
    /// Memory of the machine
    memory_bytes: u64,
    /// Apparent size of all files
    bytes: u64,
    /// What they take on disk
    allocated_bytes: u64,
    /// Guest image
    image: String,
    /// Phases of its cold boot
    #[schema(value_type = Option<std::collections::BTreeMap<String, f64>>)]
    boot_ms: Option<BootTimings>,
}

impl TemplateView {
    /// The view of a template.
    pub fn new(template: &Template) -> Self {
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

/// Every template
#[derive(Debug, Serialize, ToSchema)]
pub struct TemplateList {
    /// By name
    items: Vec<TemplateView>,
    /// Always `null`: all of them are on this page
    next_token: Option<String>,
}

/// List templates
#[utoipa::path(get, path = "/templates", tag = "templates", operation_id = "list_templates",
    responses((status = 200, description = "Every template", body = TemplateList)))]
pub async fn list(State(app): State<App>) -> Json<TemplateList> {
    let items = app.engine.templates().iter().map(|t| TemplateView::new(t)).collect();
    Json(TemplateList { items, next_token: None })
}

/// Show a template
#[utoipa::path(get, path = "/templates/{name}", tag = "templates", operation_id = "get_template",
    params(("name" = String, Path, description = "Its name")),
    responses((status = 200, description = "The template", body = TemplateView),
        (status = 404, description = "`template_not_found`")))]
pub async fn get(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<TemplateView>, ApiError> {
    let template = app.engine.template(&name);
    let template = template.ok_or_else(|| ApiError::template_not_found(&name))?;
    Ok(Json(TemplateView::new(&template)))
}
