//! Places where identities and credentials are kept, each by its name.

use super::{Findings, name};
use std::fs;
use std::path::{Path, PathBuf};

/// Rule, folder, what the file's name begins and ends with, what it is.
type Place = (&'static str, &'static str, &'static str, &'static str, &'static str);

const PLACES: &[Place] = &[
    ("random-seed", "var/lib/systemd", "random-seed", "", "feeds the next boot of every clone"),
    ("random-seed", "var/lib/systemd", "credential.secret", "", "key of systemd's credentials"),
    ("dhcp-lease", "var/lib/dhcp", "", "leases", "another machine's address"),
    ("dhcp-lease", "var/lib/dhclient", "", "leases", "another machine's address"),
    ("dhcp-lease", "var/lib/dhcpcd", "", ".lease", "another machine's address"),
    ("dhcp-lease", "var/lib/NetworkManager", "", ".lease", "another machine's address"),
    ("dhcp-lease", "run/systemd/netif/leases", "", "", "another machine's address"),
    ("cloud-init", "var/lib/cloud/data", "", "instance-id", "id of another instance"),
    ("cloud-init", "run/cloud-init", "instance-data", ".json", "data of another instance"),
];
/// Files of a home folder that exist to hold credentials.
const CREDENTIALS: &[&str] = &[
    ".aws/credentials",
    ".netrc",
    ".git-credentials",
    ".docker/config.json",
    ".pypirc",
    ".config/gh/hosts.yml",
    ".config/gcloud/application_default_credentials.json",
    ".kube/config",
    ".azure/accessTokens.json",
];
/// Home folders, journals and the like that are looked at.
const MAX_FOLDERS: usize = 1000;

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|e| e.path()).take(MAX_FOLDERS).collect();
    files.sort_unstable();
    files
}

/// Empty files hold nothing.
fn holds_something(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.is_file() && m.len() > 0)
}

/// Looks at every place.
pub(super) fn look(root: &Path, findings: &mut Findings) {
    for (rule, folder, begin, end, what) in PLACES {
        for path in files(&root.join(folder)).iter().filter(|p| holds_something(p)) {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            if file.starts_with(begin) && file.ends_with(end) {
                findings.add(name(root, path), rule, *what);
            }
        }
    }
    for folder in files(&root.join("var/log/journal")) {
        for path in files(&folder).iter().filter(|p| holds_something(p)) {
            findings.add(name(root, path), "journal", "log of another machine");
        }
    }
    let homes = files(&root.join("home"));
    for home in homes.iter().chain(&[root.join("root")]) {
        for file in CREDENTIALS {
            let path = home.join(file);
            if holds_something(&path) {
                findings.add(name(root, &path), "credentials", "credentials of a person");
            }
        }
    }
}
