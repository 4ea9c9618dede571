//! `GET /v1/stats`: all that the dashboard and `rethaw top` show, at one moment.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use snapshotter::vmm::VmmKind;
use time::OffsetDateTime;
use uffd_handler::stats::Stats;
use utoipa::ToSchema;

use super::App;
use super::pools::PoolView;
use super::templates::TemplateView;
use crate::engine::sandbox::{Origin, Sandbox, State as SandboxState};
use crate::live::history::{CAPACITY, INTERVAL, Point};
use crate::live::{History, host};

/// Sandboxes listed; `GET /v1/sandboxes` has all of them.
const LISTED: usize = 200;

/// What the service is
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LiveService)]
pub struct ServiceView {
    /// Its version
    version: &'static str,
    /// VMM that runs new sandboxes
    #[schema(value_type = String)]
    vmm: VmmKind,
    /// Processors it may use
    cpus: usize,
    /// Since its start
    uptime_seconds: u64,
    /// When it started
    #[serde(with = "time::serde::rfc3339")]
    started_at: OffsetDateTime,
    /// Its clock
    #[serde(with = "time::serde::rfc3339")]
    now: OffsetDateTime,
}

/// Sandboxes: how many there are, and the newest of them
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LiveSandboxes)]
pub struct SandboxesView {
    /// All of them
    total: usize,
    /// How many are in each state
    #[schema(value_type = BTreeMap<String, u32>)]
    by_state: BTreeMap<&'static str, u32>,
    /// The newest, at most 200
    items: Vec<SandboxRow>,
}

/// A sandbox in short
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LiveSandbox)]
struct SandboxRow {
    /// Its id
    id: String,
    /// Its label `name`
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    name: Option<String>,
    /// Its template
    template: String,
    /// Its state
    state: SandboxState,
    /// Where its machine came from
    origin: Origin,
    /// When it was claimed
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// When its time is up
    #[serde(with = "time::serde::rfc3339")]
    expires_at: OffsetDateTime,
    /// How long the request took that made it what it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    total_ms: Option<f64>,
    /// Demand faults since its machine was restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    page_faults: Option<u64>,
}

/// The page server, counted since the service started
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LivePageServer)]
pub struct PageServerView {
    /// Demand faults
    faults_total: u64,
    /// Put into guests
    copied_bytes_total: u64,
    /// Put in place before they were asked for
    prefetched_pages_total: u64,
    /// Of the pages wanted, those in place before
    working_set_hit_ratio: Option<f64>,
    /// Page servers that died and were replaced
    restarts_total: u64,
    /// VMs it serves
    vms: usize,
}

/// The recent past
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = LiveHistory)]
pub struct HistoryView {
    /// Length of an interval
    interval_seconds: f64,
    /// Points kept
    capacity: usize,
    /// Oldest first
    points: Vec<Point>,
}

/// What the service does at one moment
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Stats)]
pub struct StatsView {
    /// The service
    service: ServiceView,
    /// The pools
    pools: Vec<PoolView>,
    /// The sandboxes
    sandboxes: SandboxesView,
    /// The templates
    templates: Vec<TemplateView>,
    /// The page server
    page_server: PageServerView,
    /// The last ten minutes
    history: HistoryView,
}

/// Show what the service does now, and did in the last minutes
#[utoipa::path(get, path = "/stats", tag = "service", operation_id = "get_stats",
    responses((status = 200, description = "Everything at one moment", body = StatsView)))]
pub async fn get(State(app): State<App>) -> Json<StatsView> {
    Json(StatsView::new(&app))
}

impl StatsView {
    /// Everything now.
    pub fn new(app: &App) -> Self {
        Self {
            service: ServiceView::new(app),
            pools: pools(app),
            sandboxes: sandboxes(app),
            templates: templates(app),
            page_server: page_server(app),
            history: HistoryView::new(&app.history),
        }
    }
}

impl ServiceView {
    fn new(app: &App) -> Self {
        let (now, uptime) = (OffsetDateTime::now_utc(), app.engine.uptime());
        Self {
            version: env!("CARGO_PKG_VERSION"),
            vmm: app.engine.driver().kind(),
            cpus: host::cpus(),
            uptime_seconds: uptime.as_secs(),
            started_at: now - uptime,
            now,
        }
    }
}

impl HistoryView {
    fn new(history: &History) -> Self {
        Self {
            interval_seconds: INTERVAL.as_secs_f64(),
            capacity: CAPACITY,
            points: history.points(),
        }
    }
}

/// The pools.
pub fn pools(app: &App) -> Vec<PoolView> {
    app.engine.pools().into_iter().map(PoolView::new).collect()
}

/// The templates.
pub fn templates(app: &App) -> Vec<TemplateView> {
    app.engine.templates().iter().map(|t| TemplateView::new(&app.engine, t)).collect()
}

/// The sandboxes.
pub fn sandboxes(app: &App) -> SandboxesView {
    let all = app.engine.sandboxes();
    let mut by_state = BTreeMap::new();
    for sandbox in &all {
        *by_state.entry(sandbox.state().as_str()).or_default() += 1;
    }
    let items = all.iter().take(LISTED).map(|sandbox| row(app, sandbox)).collect();
    SandboxesView { total: all.len(), by_state, items }
}

fn row(app: &App, sandbox: &Sandbox) -> SandboxRow {
    let mut data = sandbox.data();
    SandboxRow {
        name: data.metadata.remove("name"),
        state: sandbox.state(),
        page_faults: app.engine.pager().vm_stats(&data.id).ok().map(|stats| stats.faults()),
        total_ms: data.timings_ms.get("total").copied(),
        id: data.id,
        template: data.template,
        origin: data.origin,
        created_at: data.created_at,
        expires_at: data.expires_at,
    }
}

/// The page server.
pub fn page_server(app: &App) -> PageServerView {
    let pager = app.engine.pager();
    let stats: Stats = pager.stats();
    PageServerView {
        faults_total: stats.faults(),
        copied_bytes_total: stats.bytes_copied,
        prefetched_pages_total: stats.prefetched,
        working_set_hit_ratio: stats.working_set_hit_ratio(),
        restarts_total: pager.restarts(),
        vms: pager.vms().len(),
    }
}
