//! `/v1/templates`: what sandboxes can be made from, and how more of it comes to be.

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use snapshotter::manifest::BootTimings;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use utoipa::{IntoParams, ToSchema};

use super::App;
use super::error::{ApiError, ErrorCode};
use super::json::JsonBody;
use crate::engine::Engine;
use crate::engine::build::{BuildLog, Spec, Step, check_name};
use crate::engine::template::{BASE, Failure, ReadyTemplate, Template, TemplateState};

/// Bytes of a log read at a time.
const LOG_CHUNK: u64 = 64 << 10;

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
    /// What it was made from, the first one first, itself last
    lineage: Vec<String>,
    /// When it was asked for
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// When a sandbox was last made from it, or a template begun on it
    #[serde(with = "time::serde::rfc3339::option")]
    last_used_at: Option<OffsetDateTime>,
    /// Its snapshot was there already when it was asked for
    cached: bool,
    /// Template it starts from
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    from: Option<String>,
    /// What is done in it
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, value_type = Option<Vec<Object>>)]
    steps: Option<Vec<Step>>,
    /// The step of its build that runs, from 1
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    step: Option<usize>,
    /// Why it failed
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    error: Option<String>,
    /// Which step failed, and how
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    failure: Option<Failure>,
    /// What sandboxes are restored from, once it is ready
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
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
    /// Apparent size of all its own files
    bytes: u64,
    /// What they take on disk
    allocated_bytes: u64,
    /// Memory that differs from the parent's, on disk; all of it without a parent
    memory_layer_bytes: u64,
    /// The same of the writable disk
    disk_layer_bytes: u64,
    /// Memory layers a page is looked up in, its own among them
    layers: usize,
    /// Guest image
    image: String,
    /// Phases of its cold boot
    #[schema(value_type = Option<std::collections::BTreeMap<String, f64>>)]
    boot_ms: Option<BootTimings>,
}

impl SnapshotView {
    fn new(ready: &ReadyTemplate) -> Self {
        let m = &ready.manifest;
        let allocated = |of: &dyn Fn(&str) -> bool| {
            m.files.iter().filter(|(name, _)| of(name)).map(|(_, f)| f.allocated_bytes).sum()
        };
        Self {
            id: m.id.clone(),
            parent: m.parent.clone(),
            vcpus: m.size.vcpus,
            memory_bytes: m.size.memory_bytes,
            bytes: m.files.values().map(|f| f.bytes).sum(),
            allocated_bytes: m.allocated_bytes(),
            memory_layer_bytes: allocated(&|name| name.starts_with("memory.")),
            disk_layer_bytes: allocated(&|name| {
                name.starts_with("disk.") || name.starts_with("scratch.")
            }),
            layers: ready.memory.layers.len(),
            image: m.image.clone(),
            boot_ms: m.boot.clone(),
        }
    }
}

impl TemplateView {
    /// The view of a template.
    pub fn new(engine: &Engine, template: &Template) -> Self {
        let status = template.status();
        Self {
            name: template.name.clone(),
            state: status.state,
            message: status.message,
            lineage: engine.lineage(template),
            created_at: template.created_at,
            last_used_at: template.last_used(),
            cached: status.cached,
            from: template.spec.as_ref().map(|spec| spec.from.clone()),
            steps: template.spec.as_ref().map(|spec| spec.steps.clone()),
            step: status.step,
            error: status.error,
            failure: status.failure,
            snapshot: status.ready.as_deref().map(SnapshotView::new),
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
    let engine = &app.engine;
    let items = engine.templates().iter().map(|t| TemplateView::new(engine, t)).collect();
    Json(TemplateList { items, next_token: None })
}

fn find(app: &App, name: &str) -> Result<std::sync::Arc<Template>, ApiError> {
    app.engine.template(name).ok_or_else(|| ApiError::template_not_found(name))
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
    Ok(Json(TemplateView::new(&app.engine, &*find(&app, &name)?)))
}

/// A template to derive
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BuildTemplate)]
pub struct BuildBody {
    /// Its name
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,63}$")]
    name: String,
    /// Template it starts from
    #[serde(default = "base")]
    from: String,
    /// What is done in it, in this order; each an object with one member: `run`, `copy`, `env`,
    /// `workdir`, `user`, `start`, `wait` or `check`
    #[serde(default)]
    #[schema(value_type = Vec<Object>, max_items = 200)]
    steps: Vec<Value>,
}

fn base() -> String {
    BASE.to_owned()
}

/// Derive a template: a build begins, or the same one is found
#[utoipa::path(post, path = "/templates", tag = "templates", operation_id = "build_template",
    request_body = BuildBody,
    responses((status = 202, description = "The template as it is now", body = TemplateView),
        (status = 409, description = "`template_exists`: of other steps"),
        (status = 507, description = "`disk_budget_exceeded`")))]
pub async fn build(
    State(app): State<App>,
    JsonBody(body): JsonBody<BuildBody>,
) -> Result<Response, ApiError> {
    check_name(&body.name).map_err(ApiError::invalid)?;
    let mut steps = body.steps;
    for (number, step) in steps.iter_mut().enumerate() {
        keep_archive(&app, number, step).await?;
    }
    let spec = Spec::parse(body.from, steps).map_err(ApiError::invalid)?;
    let template = app.engine.build_template(&body.name, spec).await?;
    let view = TemplateView::new(&app.engine, &template);
    Ok((StatusCode::ACCEPTED, Json(view)).into_response())
}

/// An archive that comes with the request is kept like one that was uploaded ahead.
async fn keep_archive(app: &App, number: usize, step: &mut Value) -> Result<(), ApiError> {
    let Some(copy) = step.get_mut("copy").and_then(Value::as_object_mut) else { return Ok(()) };
    let Some(archive) = copy.remove("archive_base64") else { return Ok(()) };
    let place = format!("steps[{number}].copy.archive_base64");
    let text = archive.as_str().ok_or_else(|| ApiError::invalid(format!("{place}: no text")))?;
    let bytes = STANDARD.decode(text);
    let bytes = bytes.map_err(|e| ApiError::invalid(format!("{place}: {e}")))?;
    let sha256 = app.engine.inputs().keep(bytes, app.engine.room()).await?;
    copy.insert("archive_sha256".to_owned(), Value::String(sha256));
    Ok(())
}

/// Delete a template that nothing needs
#[utoipa::path(delete, path = "/templates/{name}", tag = "templates",
    operation_id = "delete_template",
    params(("name" = String, Path, description = "Its name")),
    responses((status = 204, description = "It is gone"),
        (status = 404, description = "`template_not_found`"),
        (status = 409, description = "`template_in_use`; the message says by what"),
        (status = 503, description = "`template_busy`: its build does not stop")))]
pub async fn delete(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    app.engine.delete_template(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How to read a log
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct LogQuery {
    /// Until the build ends
    #[serde(default)]
    #[param(required = false)]
    follow: bool,
}

/// Read what a template's build said, one object a line
#[utoipa::path(get, path = "/templates/{name}/log", tag = "templates",
    operation_id = "get_template_log",
    params(("name" = String, Path, description = "Its name"), LogQuery),
    responses((status = 200, description = "`{time, kind, step?, text}`, one a line",
            body = Object, content_type = "application/x-ndjson"),
        (status = 404, description = "`template_not_found`"),
        (status = 500, description = "`log_unreadable`")))]
pub async fn log(
    State(app): State<App>,
    Path(name): Path<String>,
    query: Result<Query<LogQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::malformed(e.body_text()))?;
    let log = find(&app, &name)?.log.clone();
    let reader = LogReader::open(&log, query.follow).await?;
    let pieces = futures_util::stream::unfold(reader, |reader| async move { reader.next().await });
    let body = Body::from_stream(pieces);
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

struct LogReader {
    // `None` for a template that was never built.
    file: Option<tokio::fs::File>,
    extent: tokio::sync::watch::Receiver<crate::engine::build::Extent>,
    at: u64,
    follow: bool,
}

impl LogReader {
    async fn open(log: &BuildLog, follow: bool) -> Result<Self, ApiError> {
        let file = match tokio::fs::File::open(log.path()).await {
            Ok(file) => Some(file),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => {
                let status = StatusCode::INTERNAL_SERVER_ERROR;
                return Err(ApiError::new(status, ErrorCode::LOG_UNREADABLE, e.to_string()));
            }
        };
        Ok(Self { file, extent: log.watch(), at: 0, follow })
    }

    /// The next piece, only of whole lines.
    async fn next(mut self) -> Option<(std::io::Result<Bytes>, Self)> {
        let from = self.at;
        let extent = if self.follow {
            *self.extent.wait_for(|extent| extent.bytes > from || extent.ended).await.ok()?
        } else {
            *self.extent.borrow()
        };
        if extent.bytes <= from {
            return None;
        }
        let file = self.file.as_mut()?;
        let mut piece = vec![0; (extent.bytes - from).min(LOG_CHUNK) as usize];
        let read = async {
            file.seek(std::io::SeekFrom::Start(from)).await?;
            file.read_exact(&mut piece).await
        };
        if let Err(e) = read.await {
            self.file = None;
            return Some((Err(e), self));
        }
        self.at += piece.len() as u64;
        Some((Ok(Bytes::from(piece)), self))
    }
}
