//! What a request may ask for and cannot get here: said so, instead of passed over in silence.

use serde::Deserialize;
use serde_json::Value;

use crate::http::error::ApiError;

/// Fields of E2B's that have no counterpart.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Unsupported {
    mcp: Option<Value>,
    iam: Option<Value>,
    volume_mounts: Option<Value>,
    network: Option<Value>,
    auto_resume: Option<AutoResume>,
    auto_pause_memory: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AutoResume {
    enabled: bool,
}

impl Unsupported {
    /// Refuses what would have to be done and is not.
    pub fn check(&self) -> Result<(), ApiError> {
        let empty = |value: &Option<Value>| match value {
            None | Some(Value::Null) => true,
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Object(fields)) => fields.is_empty(),
            Some(_) => false,
        };
        let refused = [
            ("mcp", empty(&self.mcp)),
            ("iam", empty(&self.iam)),
            ("volumeMounts", empty(&self.volume_mounts)),
            ("network", empty(&self.network)),
            ("autoResume", !self.auto_resume.as_ref().is_some_and(|a| a.enabled)),
        ];
        if let Some((field, _)) = refused.iter().find(|(_, fine)| !fine) {
            return Err(ApiError::invalid(format!(
                "{field}: not supported by rethaw; leave it out"
            )));
        }
        with_memory("autoPauseMemory", self.auto_pause_memory)
    }
}

/// Refuses to leave a sandbox's memory out.
pub fn with_memory(field: &str, memory: Option<bool>) -> Result<(), ApiError> {
    if memory == Some(false) {
        let message = format!("{field}: a sandbox is always kept with its memory; leave it out");
        return Err(ApiError::invalid(message));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    fn check(body: &str) -> Option<String> {
        let body: Unsupported = serde_json::from_str(body).unwrap();
        body.check().err().map(|e| e.message().to_owned())
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        assert_eq!(check("{}"), None);
        assert_eq!(check(r#"{"mcp":null,"volumeMounts":[],"autoResume":{"enabled":false}}"#), None);
        assert!(check(r#"{"volumeMounts":[{"name":"v"}]}"#).unwrap().starts_with("volumeMounts:"));
        assert!(check(r#"{"autoResume":{"enabled":true}}"#).unwrap().starts_with("autoResume:"));
        assert!(check(r#"{"autoPauseMemory":false}"#).unwrap().starts_with("autoPauseMemory:"));
    }
}
