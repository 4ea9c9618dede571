//! The service's log, and the id of the request that work belongs to: it is in every line about that
//! work, and goes along to the page server and to the agents for theirs.

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::{LookupSpan, Registry};
use tracing_subscriber::util::SubscriberInitExt;

/// Name of the span of a request; its field `id` is the request's.
pub const REQUEST: &str = "request";

/// Starts the log, as the environment wants it.
pub fn init() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("RETHAW_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let json = std::env::var("RETHAW_LOG_FORMAT").is_ok_and(|format| format == "json");
    let lines = if json { lines.json().boxed() } else { lines.boxed() };
    // Ids are kept whatever is logged here: others log them, too.
    let ids = RequestIds.with_filter(filter_fn(|meta| meta.is_span() && meta.name() == REQUEST));
    Registry::default().with(lines.with_filter(filter)).with(ids).init();
}

/// Id of the request that the caller works for: that of the span it is in.
pub fn request_id() -> Option<String> {
    tracing::dispatcher::get_default(|dispatch| {
        let registry = dispatch.downcast_ref::<Registry>()?;
        let span = registry.span(dispatch.current_span().id()?)?;
        span.scope().find_map(|span| span.extensions().get::<RequestId>().map(|id| id.0.clone()))
    })
}

/// Kept with a request's span.
struct RequestId(String);

/// Keeps it there.
struct RequestIds;

impl<S> Layer<S> for RequestIds
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut found = FindId(None);
        attributes.record(&mut found);
        if let (Some(span), Some(id)) = (context.span(id), found.0) {
            span.extensions_mut().insert(RequestId(id));
        }
    }
}

struct FindId(Option<String>);

impl Visit for FindId {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "id" {
            self.0 = Some(format!("{value:?}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Instrument;

    #[tokio::test]
    async fn work_knows_its_request_on_other_tasks_too() {
        let ids = RequestIds.with_filter(filter_fn(|meta| meta.name() == REQUEST));
        let nothing = tracing_subscriber::filter::LevelFilter::OFF;
        let lines = tracing_subscriber::fmt::layer().with_filter(nothing);
        let _log = tracing::subscriber::set_default(Registry::default().with(lines).with(ids));
        assert_eq!(request_id(), None);
        let span = tracing::info_span!(REQUEST, id = %"r-1", method = %"GET");
        let work = async {
            assert_eq!(request_id().as_deref(), Some("r-1"));
            let inner = async { request_id() }.instrument(tracing::info_span!("inner"));
            assert_eq!(inner.await.as_deref(), Some("r-1"));
            tokio::spawn(async { request_id() }.in_current_span()).await.unwrap()
        };
        assert_eq!(work.instrument(span).await.as_deref(), Some("r-1"));
        assert_eq!(request_id(), None);
    }
}
