//! Folders people put things in, walked for private keys and tokens.

use super::{Findings, name, secrets};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const FOLDERS: &[&str] =
    &["etc", "root", "home", "opt", "srv", "usr/local", "var/lib", "var/spool", "var/tmp", "tmp"];
/// Package managers' own data, large and known.
const SKIPPED: &[&str] = &["var/lib/dpkg", "var/lib/apt", "etc/ssl/certs"];
const MAX_FILES: u32 = 50_000;
const MAX_DEPTH: usize = 12;
const TIME: Duration = Duration::from_secs(20);
/// Keys and scripts are small: larger files are not read.
const MAX_SIZE: u64 = 256 * 1024;

/// Walks all folders; gives the number of files seen.
pub(super) fn look(root: &Path, findings: &mut Findings) -> u32 {
    let until = Instant::now() + TIME;
    let server = root.join("usr/sbin/sshd").exists();
    let skipped: Vec<PathBuf> = SKIPPED.iter().map(|path| root.join(path)).collect();
    let mut seen = 0;
    let mut folders: Vec<(PathBuf, usize)> =
        FOLDERS.iter().map(|path| (root.join(path), 0)).collect();
    while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            // Links are not followed: what they lead to is found by its own name.
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() && !skipped.contains(&path) {
                if depth >= MAX_DEPTH {
                    let text = format!("more than {MAX_DEPTH} folders deep: not looked into");
                    findings.add(name(root, &path), "incomplete", text);
                    continue;
                }
                folders.push((path, depth + 1));
            } else if kind.is_file() {
                seen += 1;
                if seen > MAX_FILES || Instant::now() > until {
                    let text = format!("not all looked at: {seen} files, {TIME:?} were the limit");
                    findings.add(name(root, &folder), "incomplete", text);
                    return seen;
                }
                file(root, &path, server, findings);
            }
        }
    }
    seen
}

fn file(root: &Path, path: &Path, server: bool, findings: &mut Findings) {
    let mut bytes = Vec::new();
    let Ok(file) = fs::File::open(path) else { return };
    if file.metadata().map_or(u64::MAX, |m| m.len()) > MAX_SIZE {
        return;
    }
    let Ok(_) = file.take(MAX_SIZE).read_to_end(&mut bytes) else { return };
    let text = String::from_utf8_lossy(&bytes);
    let file_name = path.file_name().unwrap_or_default().to_string_lossy();
    if secrets::private_key(&text) {
        let host_key = file_name.starts_with("ssh_host_");
        // With a server, each clone makes its own; see the identity's item.
        match (host_key, server) {
            (true, true) => {}
            (true, false) => findings.add(name(root, path), "ssh-host-key", "key of a host"),
            (false, _) => findings.add(name(root, path), "private-key", "a private key"),
        }
    }
    let scripts = file_name.ends_with("_history") || file_name.ends_with(".env");
    if scripts || file_name == ".npmrc" || file_name == "environment" {
        for (number, line) in text.lines().enumerate() {
            if let Some(kind) = secrets::line(line) {
                findings.add(name(root, path), "token", format!("line {}: {kind}", number + 1));
            }
        }
    }
}
