//! `error_code`: the closed list of what a refusal can be, for programs.
//!
//! There is no way to make one that is not in the list: the service's own codes are written here and
//! nowhere else, the guest's in [`guest_agent::wire::codes`]. The OpenAPI document shows both.

use std::collections::BTreeSet;

use guest_agent::wire::codes;
use serde::Serialize;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// What kind of refusal it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ErrorCode(&'static str);

macro_rules! list {
    ($($name:ident = $text:literal,)*) => {
        impl ErrorCode {
            $(#[doc = $text] pub const $name: Self = Self($text);)*
            const OWN: &'static [&'static str] = &[$($text),*];
        }
    };
}

list! {
    BODY_TOO_LONG = "body_too_long",
    DISK_BUDGET_EXCEEDED = "disk_budget_exceeded",
    FORBIDDEN = "forbidden",
    GC_FAILED = "gc_failed",
    GUEST_TIMEOUT = "guest_timeout",
    GUEST_UNREACHABLE = "guest_unreachable",
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused",
    IDENTITY_NOT_PROVEN = "identity_not_proven",
    INPUT_NOT_FOUND = "input_not_found",
    INPUT_NOT_KEPT = "input_not_kept",
    INVALID_FIELD = "invalid_field",
    KEY_NOT_FOUND = "key_not_found",
    KEY_UNAVAILABLE = "key_unavailable",
    LOG_UNREADABLE = "log_unreadable",
    MALFORMED_REQUEST = "malformed_request",
    METHOD_NOT_ALLOWED = "method_not_allowed",
    NAME_TAKEN = "name_taken",
    NETWORK_FAILED = "network_failed",
    POOL_NOT_FOUND = "pool_not_found",
    PORT_FAILED = "port_failed",
    QUOTA_EXCEEDED = "quota_exceeded",
    REQUEST_UNDER_WAY = "request_under_way",
    RESTORE_FAILED = "restore_failed",
    ROUTE_NOT_FOUND = "route_not_found",
    SANDBOX_NOT_FOUND = "sandbox_not_found",
    SANDBOX_NOT_RUNNING = "sandbox_not_running",
    SNAPSHOT_UNSUPPORTED = "snapshot_unsupported",
    STATE_STORE_FAILED = "state_store_failed",
    TEMPLATE_BUSY = "template_busy",
    TEMPLATE_EXISTS = "template_exists",
    TEMPLATE_IN_USE = "template_in_use",
    TEMPLATE_NOT_FOUND = "template_not_found",
    TEMPLATE_NOT_READY = "template_not_ready",
    TOO_MANY_CLAIMS = "too_many_claims",
    TOO_MANY_VIEWERS = "too_many_viewers",
    UNAUTHORIZED = "unauthorized",
    UNSUPPORTED_ENCODING = "unsupported_encoding",
    UNSUPPORTED_TYPE = "unsupported_type",
    WEBSOCKET_NEEDED = "websocket_needed",
    WORKSPACE_FAILED = "workspace_failed",
    WRONG_STATE = "wrong_state",
}

impl ErrorCode {
    /// What an agent answered; one that is unknown here counts as what has no code of its own.
    pub fn of_agent(text: &str) -> Self {
        let known = codes::ALL.iter().find(|known| **known == text);
        Self(known.copied().unwrap_or(codes::INTERNAL))
    }

    /// As it is sent.
    pub fn as_str(self) -> &'static str {
        self.0
    }

    fn all() -> BTreeSet<&'static str> {
        Self::OWN.iter().chain(codes::ALL).copied().collect()
    }
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl PartialSchema for ErrorCode {
    fn schema() -> RefOr<Schema> {
        let text = ObjectBuilder::new().schema_type(Type::String);
        let text = text.description(Some("For programs: one of a closed list"));
        text.enum_values(Some(Self::all())).into()
    }
}

impl ToSchema for ErrorCode {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_codes_are_passed_on_and_no_others() {
        assert_eq!(ErrorCode::of_agent("file_not_found").as_str(), codes::FILE_NOT_FOUND);
        assert_eq!(ErrorCode::of_agent("of_an_agent_to_come").as_str(), "internal");
    }

    #[test]
    fn the_schema_has_both_lists() {
        let schema = serde_json::to_value(ErrorCode::schema()).unwrap();
        let all = schema["enum"].as_array().unwrap();
        for code in [ErrorCode::SANDBOX_NOT_FOUND.as_str(), codes::FILE_NOT_FOUND] {
            assert_eq!(all.iter().filter(|known| **known == code).count(), 1, "{code}");
        }
    }

    #[test]
    fn the_list_is_in_order_and_in_the_documentation() {
        assert!(ErrorCode::OWN.is_sorted(), "in alphabetical order, each once");
        let table = include_str!("../../docs/api.md");
        // Of the E2B face, whose clients look at the status.
        let elsewhere = ["sandbox_not_running", "unsupported_encoding", "unsupported_type"];
        for code in ErrorCode::OWN.iter().filter(|code| !elsewhere.contains(code)) {
            assert!(table.contains(&format!("`{code}`")), "{code} is not in docs/api.md");
        }
    }
}
