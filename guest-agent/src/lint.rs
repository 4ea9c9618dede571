//! The template linter, `POST /lint`: finds what would be the same in every clone and should not
//! be, secrets and left-over identities.
//!
//! It looks into known places and walks the folders people put things in, with bounds on files,
//! depth, bytes and time. Running into a bound is a finding of its own: a template is never called
//! clean because it was too large to look at. What is there on purpose is allowed, with a reason,
//! in the template's `/etc/rethaw/lint-allow`; see [`allow`].

mod allow;
mod environment;
mod places;
mod secrets;
mod walk;

use crate::clock::Instant;
use crate::wire::{LintFinding, LintReport};
use std::io;
use std::path::Path;

/// Looks through the system under `root` and at the processes under `proc`.
///
/// # Errors
/// The clock cannot be read, or the list of what is allowed is there and cannot be.
pub fn lint(root: &Path, proc: &Path) -> io::Result<LintReport> {
    let started = Instant::now()?;
    let mut findings = Findings::default();
    places::look(root, &mut findings);
    let files = walk::look(root, &mut findings);
    environment::look(proc, &mut findings);
    let allowed = allow::Allowed::read(root, &mut findings)?;
    let mut findings = findings.0;
    findings.sort_unstable();
    findings.dedup();
    for finding in &mut findings {
        finding.allowed = allowed.reason(&finding.path);
    }
    Ok(LintReport { findings, files, total_micros: started.micros() })
}

/// Findings as they come.
#[derive(Debug, Default)]
struct Findings(Vec<LintFinding>);

impl Findings {
    fn add(&mut self, path: impl Into<String>, rule: &str, detail: impl Into<String>) {
        let (path, detail) = (path.into(), detail.into());
        self.0.push(LintFinding { path, rule: rule.to_owned(), detail, allowed: None });
    }
}

/// A path under `root` as the system itself calls it.
fn name(root: &Path, path: &Path) -> String {
    let inside = path.strip_prefix(root).unwrap_or(path);
    format!("/{}", inside.to_string_lossy().trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const KEY: &str = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n";

    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join("root").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::create_dir_all(dir.path().join("proc")).unwrap();
        dir
    }

    fn report(system: &tempfile::TempDir) -> LintReport {
        lint(&system.path().join("root"), &system.path().join("proc")).unwrap()
    }

    fn found(files: &[(&str, &str)]) -> Vec<(String, String)> {
        let report = report(&system(files));
        report.findings.into_iter().map(|f| (f.rule, f.path)).collect()
    }

    fn one(rule: &str, path: &str) -> Vec<(String, String)> {
        vec![(rule.to_owned(), path.to_owned())]
    }

    #[test]
    fn a_plain_system_is_clean() {
        let files = [
            ("etc/hostname", "rethaw\n"),
            ("etc/ssl/certs/ca.pem", "-----BEGIN CERTIFICATE-----\n"),
            ("root/.bashrc", "export PATH=/bin\n"),
            ("home/user/notes.txt", "no secret here\n"),
            ("root/.bash_history", "ls -l\nmake test\n"),
            ("var/lib/dhcp/dhclient.leases", ""),
        ];
        assert_eq!(found(&files), []);
    }

    #[test]
    fn each_rule_finds_its_own() {
        for (rule, path, text) in [
            ("private-key", "root/.ssh/id_ed25519", KEY),
            ("private-key", "srv/app/tls.pem", "x\n-----BEGIN RSA PRIVATE KEY-----\n"),
            ("ssh-host-key", "etc/ssh/ssh_host_rsa_key", KEY),
            ("credentials", "home/u/.aws/credentials", "[default]\n"),
            ("credentials", "root/.netrc", "machine x\n"),
            ("token", "root/.bash_history", "ls\nexport API_TOKEN=abcdefgh12345\n"),
            ("token", "home/u/.python_history", "k='ghp_abcdefghijklmnopqrstuvwxyz0123456789'\n"),
            ("token", "opt/app/.env", "DB_PASSWORD=correcthorse\n"),
            ("random-seed", "var/lib/systemd/random-seed", "seed"),
            ("dhcp-lease", "var/lib/dhcp/dhclient.eth0.leases", "lease {}\n"),
            ("cloud-init", "var/lib/cloud/data/instance-id", "i-1\n"),
            ("journal", "var/log/journal/0123/system.journal", "LPKSHHRH"),
        ] {
            assert_eq!(found(&[(path, text)]), one(rule, &format!("/{path}")));
        }
    }

    #[test]
    fn host_keys_that_every_clone_makes_anew_are_fine() {
        let files = [("usr/sbin/sshd", ""), ("etc/ssh/ssh_host_ed25519_key", KEY)];
        assert_eq!(found(&files), []);
    }

    #[test]
    fn environments_are_looked_into_and_secrets_not_shown() {
        let system = system(&[]);
        let process = system.path().join("proc/7");
        fs::create_dir_all(&process).unwrap();
        fs::write(process.join("environ"), "A=b\0MY_SECRET=hunter2hunter2\0").unwrap();
        fs::write(process.join("comm"), "server\n").unwrap();
        let report = report(&system);
        assert_eq!((report.findings[0].path.as_str(), report.findings.len()), ("env:MY_SECRET", 1));
        assert!(report.findings[0].detail.contains("server"), "{report:?}");
        assert!(!format!("{report:?}").contains("hunter2"));
    }

    #[test]
    fn what_is_allowed_needs_a_reason() {
        let allow = "# keys of the test suite\n/srv/**/*.pem test fixtures\n/root/.netrc\n";
        let files = [
            ("etc/rethaw/lint-allow", allow),
            ("srv/app/tests/tls.pem", KEY),
            ("root/.netrc", "machine x\n"),
        ];
        let report = report(&system(&files));
        let refused: Vec<_> = report.refused().map(|f| (&*f.rule, &*f.path)).collect();
        let wanted = [("lint-allow", "/etc/rethaw/lint-allow"), ("credentials", "/root/.netrc")];
        assert_eq!(refused, wanted);
        let allowed = report.findings.iter().find(|f| f.allowed.is_some()).unwrap();
        assert_eq!(allowed.path, "/srv/app/tests/tls.pem");
        assert_eq!(allowed.allowed.as_deref(), Some("test fixtures"));
    }
}
