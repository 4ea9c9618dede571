//! The dashboard at `/`: files that are part of the binary, nothing from anywhere else.
//!
//! ```text
//! theme.js   before the first paint: light or dark
//! app.js     the way in: asks for the key, connects feed and views
//!   feed.js    GET /v1/events; after a break it starts over
//!   api.js     the other requests; the key, for as long as the tab is open
//!   chart.js   lines over time
//!   pools.js sandboxes.js templates.js log.js vitals.js   one part of the page each
//!   dom.js format.js                               what they share
//! ```
//!
//! The pages hold no secret and are served without a key; what they show is not.

use std::sync::LazyLock;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};

use crate::http::{ApiError, App};

/// Only what this service itself serves may be loaded or asked, and nobody may frame it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Stands in the page for whether a key is needed.
const KEY_MARK: &str = "{{key}}";

const PAGE: &str = include_str!("index.html");

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

struct Asset {
    name: &'static str,
    media_type: &'static str,
    body: &'static str,
}

macro_rules! assets {
    ($($name:literal: $media_type:expr,)*) => {
        &[$(Asset { name: $name, media_type: $media_type, body: include_str!($name) },)*]
    };
}

const ASSETS: &[Asset] = assets! {
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "theme.js": JAVASCRIPT,
    "app.js": JAVASCRIPT,
    "api.js": JAVASCRIPT,
    "feed.js": JAVASCRIPT,
    "chart.js": JAVASCRIPT,
    "dom.js": JAVASCRIPT,
    "format.js": JAVASCRIPT,
    "log.js": JAVASCRIPT,
    "pools.js": JAVASCRIPT,
    "sandboxes.js": JAVASCRIPT,
    "templates.js": JAVASCRIPT,
    "vitals.js": JAVASCRIPT,
};

/// One tag for all files: they belong together.
static TAG: LazyLock<HeaderValue> = LazyLock::new(|| {
    let mut digest = Sha256::new_with_prefix(PAGE);
    ASSETS.iter().for_each(|asset| digest.update(asset.body));
    let tag = format!("\"{}\"", hex::encode(&digest.finalize()[..12]));
    HeaderValue::from_str(&tag).unwrap_or(HeaderValue::from_static("\"rethaw\""))
});

/// The page and its files.
pub fn routes() -> Router<App> {
    Router::new().route("/", get(page)).route("/dashboard/{file}", get(file))
}

async fn page(State(app): State<App>) -> Response {
    let key = if app.everybody.is_none() { "needed" } else { "none" };
    // Depends on the settings, so it is never taken from a cache.
    let body = PAGE.replace(KEY_MARK, key);
    (protect("text/html; charset=utf-8"), body).into_response()
}

async fn file(Path(name): Path<String>, headers: HeaderMap) -> Result<Response, ApiError> {
    let asset = ASSETS.iter().find(|asset| asset.name == name);
    let asset = asset.ok_or_else(ApiError::route_not_found)?;
    let has = headers.get(header::IF_NONE_MATCH).is_some_and(|tag| *tag == *TAG);
    let tag = [(header::ETAG, TAG.clone())];
    if has {
        return Ok((StatusCode::NOT_MODIFIED, tag).into_response());
    }
    Ok((protect(asset.media_type), tag, asset.body).into_response())
}

fn protect(media_type: &'static str) -> [(HeaderName, HeaderValue); 5] {
    [
        (header::CONTENT_TYPE, HeaderValue::from_static(media_type)),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        // Asked for anew each time, answered with "not modified": an upgrade shows at once.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_names_only_files_that_are_served() {
        assert_eq!(PAGE.matches(KEY_MARK).count(), 1);
        let sources = ASSETS.iter().map(|asset| asset.body).chain([PAGE]);
        for text in sources {
            for (at, _) in text.match_indices("/dashboard/") {
                let name: String = text[at + "/dashboard/".len()..]
                    .chars()
                    .take_while(|c| c.is_ascii_alphanumeric() || *c == '.')
                    .collect();
                assert!(ASSETS.iter().any(|asset| asset.name == name), "{name}");
            }
        }
    }

    #[test]
    fn modules_import_only_files_that_are_served() {
        for asset in ASSETS.iter().filter(|asset| asset.media_type == JAVASCRIPT) {
            for line in asset.body.lines().filter(|line| line.contains(" from \"")) {
                let name = line.split(" from \"./").nth(1).and_then(|rest| rest.split('"').next());
                let served = name.is_some_and(|name| ASSETS.iter().any(|a| a.name == name));
                assert!(served, "{}: {line}", asset.name);
            }
        }
    }

    /// What the policy would refuse must not be there in the first place.
    #[test]
    fn nothing_is_loaded_from_elsewhere_or_inline() {
        for text in ASSETS.iter().map(|asset| asset.body).chain([PAGE]) {
            let known = text.replace("http://www.w3.org/2000/svg", "");
            for bad in ["http:", "https:", "//cdn", "@import", "url(", "eval(", "innerHTML"] {
                assert!(!known.contains(bad), "{bad}");
            }
        }
        for bad in ["style=\"", " onclick", " onload", "<style"] {
            assert!(!PAGE.contains(bad), "{bad}");
        }
    }
}
