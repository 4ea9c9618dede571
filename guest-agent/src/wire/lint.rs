//! What the template linter reports.

use serde::{Deserialize, Serialize};

/// Something a template should not hand to every clone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LintFinding {
    /// The file, or `env:NAME` for a variable of a running process.
    pub path: String,
    /// Which rule found it, `private-key` for one.
    pub rule: String,
    /// What was found, never the secret itself.
    pub detail: String,
    /// Why the template allows it, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<String>,
}

/// Answer to `POST /lint`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LintReport {
    /// All findings, those that are allowed as well, in the order of their paths.
    pub findings: Vec<LintFinding>,
    /// Files that were looked at.
    pub files: u32,
    /// Time it took in the guest.
    pub total_micros: u64,
}

impl LintReport {
    /// What nobody has allowed.
    pub fn refused(&self) -> impl Iterator<Item = &LintFinding> {
        self.findings.iter().filter(|finding| finding.allowed.is_none())
    }
}
