//! Environments of running processes: whatever runs in a template runs in every clone.

use super::{Findings, secrets};
use std::fs;
use std::io::Read;
use std::path::Path;

/// Processes that are looked at, and bytes of each one's environment.
const MAX_PROCESSES: usize = 4096;
const MAX_BYTES: u64 = 128 * 1024;

/// Looks into every process under `proc`.
pub(super) fn look(proc: &Path, findings: &mut Findings) {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    let number = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_digit());
    let mut seen = 0;
    for entry in entries.filter(|e| e.file_name().to_str().is_some_and(number)) {
        seen += 1;
        if seen > MAX_PROCESSES {
            findings.add("env:*", "incomplete", format!("more than {MAX_PROCESSES} processes"));
            return;
        }
        let mut environ = Vec::new();
        // A process that has ended meanwhile has no environment.
        let Ok(file) = fs::File::open(entry.path().join("environ")) else { continue };
        let Ok(_) = file.take(MAX_BYTES).read_to_end(&mut environ) else { continue };
        for variable in environ.split(|b| *b == 0) {
            let variable = String::from_utf8_lossy(variable);
            let Some((name, value)) = variable.split_once('=') else { continue };
            if secrets::is_assignment(name, value) || secrets::token(value).is_some() {
                let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                let pid = entry.file_name().to_string_lossy().into_owned();
                let text = format!("in process {pid} ({})", command.trim_end());
                findings.add(format!("env:{name}"), "token", text);
            }
        }
    }
}
