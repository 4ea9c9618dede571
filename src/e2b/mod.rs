//! The E2B face: what the unmodified `e2b` SDKs ask for, on the same listener as the native API.
//!
//! ```text
//! control plane, API key                 /sandboxes, /v2/sandboxes, /snapshots: control/
//! data plane, the sandbox's own token    /process.Process/*       data/process.rs
//!   told by the E2b-Sandbox-Id header    /filesystem.Filesystem/* data/filesystem.rs, watch.rs
//!   or a host name 49983-ID.DOMAIN       /files, /health          data/files.rs, health.rs
//! ```
//!
//! Requests are translated to calls of the engine and of the guest's agent, which know nothing of
//! E2B. What is covered and what is not: docs/e2b.md.

mod control;
mod data;
mod rpc;

pub use control::routes as control_routes;
pub use data::{by_host, routes as data_routes};

/// Version of E2B's own guest daemon whose calls are all there; it tells the SDKs what they may ask.
const ENVD_VERSION: &str = "0.6.4";
/// Port of E2B's own guest daemon: its traffic is the data plane, every other port is the guest's.
pub const ENVD_PORT: u16 = 49983;
/// User that commands run as and files belong to when the client names none.
const DEFAULT_USER: &str = "user";

/// What E2B's own API keys start with. Older SDKs send no others.
const KEY_PREFIX: &str = "e2b";

/// The key of this service that a client means with `e2b_...`: the same with another beginning.
pub fn native_key(shown: &str) -> Option<String> {
    let secret = shown.strip_prefix(KEY_PREFIX)?.strip_prefix('_')?;
    Some(format!("{}_{secret}", crate::http::KEY_PREFIX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_can_be_shown_in_the_form_that_older_sdks_send() {
        assert_eq!(native_key("e2b_00ff").as_deref(), Some("rtw_00ff"));
        assert_eq!(native_key("rtw_00ff"), None);
        assert_eq!(native_key("e2b00ff"), None);
    }
}
