//! The probe on this host, whatever it is.

use std::path::Path;
use std::time::{Duration, Instant};

use snapshotter::firecracker::kvm::{KvmVerdict, TIME_LIMIT, helper_path, probe};

#[tokio::test(flavor = "multi_thread")]
async fn the_probe_measures_guest_code_and_says_what_it_found() {
    let started = Instant::now();
    let helper = Path::new(env!("CARGO_BIN_EXE_rethaw-kvm-probe"));
    assert_eq!(helper_path().unwrap(), helper, "it is found beside this program");
    let report = probe(helper, TIME_LIMIT).await.unwrap();
    println!("KVM here {report}; {}", serde_json::to_string(&report).unwrap());
    if !report.boots_linux() {
        println!("SKIPPED: end-to-end tests with Firecracker, because KVM {report}");
    }
    assert!(started.elapsed() < 2 * TIME_LIMIT + Duration::from_secs(5));
    match &report.verdict {
        KvmVerdict::Works { instructions_per_second } => {
            assert!(*instructions_per_second >= 100_000_000);
            assert!(report.to_string().starts_with("works: "), "{report}");
        }
        KvmVerdict::Slow { instructions_per_second, .. } => {
            assert!((1..100_000_000).contains(instructions_per_second));
            let text = report.to_string();
            assert!(text.starts_with("does not boot Linux: ") && text.contains(" instructions/s"));
        }
        KvmVerdict::Broken { .. } | KvmVerdict::NotPermitted { .. } => {
            assert!(Path::new("/dev/kvm").exists());
        }
        KvmVerdict::Absent => assert!(!Path::new("/dev/kvm").exists()),
    }
}
