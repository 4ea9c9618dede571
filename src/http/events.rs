//! `GET /v1/events`: what [`super::stats`] shows, and from then on what changes in it, as
//! server-sent events.
//!
//! ```text
//! snapshot                                   once, everything
//! pools | sandboxes | templates              that part anew, when it has changed
//! point                                      one more interval of the history
//! page_server                                with every point, when it has changed
//! ```
//!
//! A viewer that lost its connection starts over with a snapshot, so events carry no ids.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::LazyLock;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use futures_util::stream::{self, Stream};
use serde::Serialize;
use tokio::sync::{Semaphore, SemaphorePermit, watch};

use super::App;
use super::error::{ApiError, ErrorCode};
use super::stats::{self, StatsView};
use crate::live;

/// Streams open at once.
const MAX_VIEWERS: usize = 64;
/// Changes closer to each other than this are told as one.
const COALESCE: Duration = Duration::from_millis(100);

static VIEWERS: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(MAX_VIEWERS));

/// Follow what the service does
///
/// `snapshot` comes first and has everything; from then on `pools`, `sandboxes`, `templates` and
/// `page_server` come anew when they have changed, and a `point` every two seconds. The stream has
/// no end of its own.
#[utoipa::path(get, path = "/events", tag = "service", operation_id = "follow_events",
    responses((status = 200, description = "Events, their data JSON", body = String,
            content_type = "text/event-stream"),
        (status = 429, description = "`too_many_viewers`")))]
pub async fn stream(
    State(app): State<App>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let Ok(permit) = VIEWERS.try_acquire() else {
        let message = format!("{MAX_VIEWERS} viewers are connected already; close one");
        let status = StatusCode::TOO_MANY_REQUESTS;
        return Err(ApiError::new(status, ErrorCode::TOO_MANY_VIEWERS, message).retry_after(5));
    };
    let viewer = Viewer::new(app, permit);
    Ok(Sse::new(stream::unfold(viewer, |mut viewer| async move {
        let event = viewer.next().await?;
        Some((Ok(event), viewer))
    })))
}

/// One open stream.
struct Viewer {
    app: App,
    bell: watch::Receiver<u64>,
    queue: VecDeque<Event>,
    // What the other side has, as it was sent.
    pools: String,
    sandboxes: String,
    templates: String,
    page_server: String,
    point: u64,
    // Frees the place when the stream is dropped.
    _permit: SemaphorePermit<'static>,
}

/// Streams open now.
pub fn viewers() -> usize {
    MAX_VIEWERS - VIEWERS.available_permits()
}

impl Viewer {
    fn new(app: App, permit: SemaphorePermit<'static>) -> Self {
        // First, so that what changes while the snapshot is taken is told afterwards.
        let bell = live::listen();
        let point = app.history.points().last().map_or(0, |point| point.seq);
        let mut viewer = Self {
            pools: text(&stats::pools(&app)),
            sandboxes: text(&stats::sandboxes(&app)),
            templates: text(&stats::templates(&app)),
            page_server: text(&stats::page_server(&app)),
            queue: VecDeque::new(),
            point,
            bell,
            app,
            _permit: permit,
        };
        let snapshot = text(&StatsView::new(&viewer.app));
        viewer.queue.push_back(Event::default().event("snapshot").data(snapshot));
        viewer
    }

    /// The next event; none when the service stops.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Some(event);
            }
            let closing = self.app.closing.clone();
            let more = async {
                self.bell.changed().await.ok()?;
                tokio::time::sleep(COALESCE).await;
                self.bell.mark_unchanged();
                Some(())
            };
            tokio::select! {
                () = closing.cancelled() => return None,
                heard = more => heard?,
            }
            self.look();
        }
    }

    /// Queues what is new.
    fn look(&mut self) {
        let app = &self.app;
        let points = app.history.after(self.point);
        let mut tell = |name: &str, sent: &mut String, now: String| {
            if *sent != now {
                self.queue.push_back(Event::default().event(name).data(&now));
                *sent = now;
            }
        };
        tell("pools", &mut self.pools, text(&stats::pools(app)));
        tell("sandboxes", &mut self.sandboxes, text(&stats::sandboxes(app)));
        tell("templates", &mut self.templates, text(&stats::templates(app)));
        if let Some(last) = points.last() {
            self.point = last.seq;
            tell("page_server", &mut self.page_server, text(&stats::page_server(app)));
        }
        for point in points {
            self.queue.push_back(Event::default().event("point").data(text(&point)));
        }
    }
}

/// JSON on one line. These types have nothing in them that JSON cannot say.
fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
