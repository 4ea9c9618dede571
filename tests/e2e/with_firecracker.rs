//! The same tests with Firecracker, where KVM boots Linux.

use std::process::Command;

/// Runs this suite again with the other driver. Not by itself: `scripts/test` runs it where KVM
/// boots Linux, and says why where it does not.
#[test]
#[ignore = "needs a KVM that boots Linux; scripts/test runs it where there is one"]
fn the_whole_suite_with_firecracker() {
    let root = env!("CARGO_MANIFEST_DIR");
    let got = Command::new(format!("{root}/scripts/get-firecracker")).status().unwrap();
    assert!(got.success(), "no Firecracker");
    let status = Command::new(std::env::current_exe().unwrap())
        .env("RETHAW_TEST_VMM", "firecracker")
        .status()
        .unwrap();
    assert!(status.success(), "the suite with Firecracker: {status}");
}
