//! `scripts/get-firecracker`, as far as it goes without a download.

use std::path::Path;
use std::process::{Command, Output};

use crate::rig::{binaries, version, workspace};

fn get(home: &Path, version: &str) -> Output {
    Command::new(workspace().join("scripts/get-firecracker"))
        .arg(version)
        .env("RETHAW_HOME", home)
        // Whatever it tries to download, it cannot.
        .env("https_proxy", "http://127.0.0.1:9")
        .env("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        .env("PIP_RETRIES", "0")
        .output()
        .unwrap()
}

#[test]
fn what_is_there_and_genuine_is_taken_and_nothing_else() {
    let home = tempfile::tempdir().unwrap();
    let version = version();
    let dir = home.path().join("firecracker").join(&version);
    std::fs::create_dir_all(&dir).unwrap();
    let installed = binaries();
    std::fs::copy(&installed.firecracker, dir.join("firecracker")).unwrap();
    std::fs::copy(&installed.jailer, dir.join("jailer")).unwrap();
    // What others than the pinned version are known by; it is there once they were installed.
    let sums = "SHA256SUMS";
    let _ = std::fs::copy(installed.jailer.with_file_name(sums), dir.join(sums));
    let output = get(home.path(), &version);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), dir.to_str().unwrap());

    // One bit more or less, and it is to be had again, which here fails.
    let mut bytes = std::fs::read(dir.join("jailer")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(dir.join("jailer"), bytes).unwrap();
    let output = get(home.path(), &version);
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("can be had neither from its release page"), "{text}");
    let left = std::fs::read_dir(home.path().join("firecracker")).unwrap().count();
    assert_eq!(left, 1, "temporary folders are removed");
}

#[test]
fn versions_that_must_not_be_used_are_not_even_got() {
    let home = tempfile::tempdir().unwrap();
    for (version, word) in [("1.16.0", "vsock"), ("latest", "looks like"), ("../1.1", "looks like")]
    {
        let output = get(home.path(), version);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && text.contains(word), "{text}");
    }
}
