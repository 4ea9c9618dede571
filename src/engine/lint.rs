//! The last word on a template before it is published: a clone of it is searched for what clones
//! should not share, and the template is refused when something is found that it does not allow.

use std::time::Duration;

use guest_agent::client::{AgentClient, AgentError};
use guest_agent::wire::LintReport;

/// The guest gives up looking after 20 s, and says so; an emulated one is slow to say it.
const DEADLINE: Duration = Duration::from_secs(60);
/// Findings named in a message.
const NAMED: usize = 20;

/// Why a template is refused.
#[derive(Debug, thiserror::Error)]
pub enum LintError {
    /// It could not be searched.
    #[error("template linter: {0}")]
    Agent(#[from] AgentError),
    /// It holds what clones should not share.
    #[error(
        "the template holds what its clones should not share: {0}. Remove it, or allow it with a \
         line `PATH REASON` in the template's /etc/rethaw/lint-allow"
    )]
    Findings(String),
}

/// Searches a clone.
pub async fn check(agent: &AgentClient) -> Result<(), LintError> {
    judge(&agent.lint(DEADLINE).await?)
}

fn judge(report: &LintReport) -> Result<(), LintError> {
    for finding in report.findings.iter().filter(|f| f.allowed.is_some()) {
        let reason = finding.allowed.as_deref().unwrap_or_default();
        tracing::info!(path = finding.path, rule = finding.rule, reason, "allowed in the template");
    }
    let refused: Vec<String> =
        report.refused().map(|f| format!("{} ({}: {})", f.path, f.rule, f.detail)).collect();
    if refused.is_empty() {
        let took = Duration::from_micros(report.total_micros);
        tracing::info!(files = report.files, ?took, "the template linter has no objection");
        return Ok(());
    }
    let mut text = refused.iter().take(NAMED).cloned().collect::<Vec<_>>().join("; ");
    if refused.len() > NAMED {
        text.push_str(&format!("; and {} more", refused.len() - NAMED));
    }
    Err(LintError::Findings(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_agent::wire::LintFinding;

    fn finding(path: &str, allowed: Option<&str>) -> LintFinding {
        LintFinding {
            path: path.to_owned(),
            rule: "private-key".to_owned(),
            detail: "a private key".to_owned(),
            allowed: allowed.map(str::to_owned),
        }
    }

    #[test]
    fn only_what_is_allowed_passes() {
        let mut report = LintReport::default();
        assert!(judge(&report).is_ok());
        report.findings.push(finding("/srv/test.pem", Some("a fixture")));
        assert!(judge(&report).is_ok());
        report.findings.push(finding("/root/.ssh/id_rsa", None));
        let error = judge(&report).unwrap_err().to_string();
        assert!(error.contains("/root/.ssh/id_rsa (private-key: a private key)"), "{error}");
        assert!(error.contains("lint-allow") && !error.contains("/srv"), "{error}");
    }

    #[test]
    fn a_long_list_is_cut() {
        let findings = (0..30).map(|n| finding(&format!("/f{n}"), None)).collect();
        let report = LintReport { findings, ..LintReport::default() };
        let error = judge(&report).unwrap_err().to_string();
        assert!(error.contains("and 10 more"), "{error}");
    }
}
