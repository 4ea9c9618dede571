use super::*;

fn verdict(lines: &[&str], in_time: bool) -> KvmVerdict {
    let mut progress = Progress { in_time, ..Progress::default() };
    for line in lines {
        progress.take(line);
    }
    progress.verdict(TIME_LIMIT)
}

const CREATED: &str = r#"{"step":"created"}"#;
const FAST: &str = r#"{"step":"speed","instructions":10000000,"micros":5000}"#;
const SLOW: &str = r#"{"step":"speed","instructions":1500000,"micros":1000000}"#;
const DONE: &str = r#"{"step":"kernel_instructions"}"#;
const STOP: &str = r#"{"step":"error","message":"the guest stopped with InternalError"}"#;

#[test]
fn hardware_works() {
    let want = KvmVerdict::Works { instructions_per_second: 2_000_000_000 };
    assert_eq!(verdict(&[CREATED, FAST, DONE], true), want);
}

#[test]
fn an_interpreter_is_slow_whatever_else() {
    assert!(matches!(
        verdict(&[CREATED, SLOW, DONE], true),
        KvmVerdict::Slow { instructions_per_second: 1_500_000, also: None }
    ));
    assert!(matches!(
        verdict(&[CREATED, SLOW, STOP], true),
        KvmVerdict::Slow { also: Some(also), .. } if also.contains("InternalError")
    ));
}

#[test]
fn fast_but_incomplete_or_hung_is_broken() {
    assert!(matches!(verdict(&[CREATED, FAST, STOP], true), KvmVerdict::Broken { .. }));
    assert!(matches!(verdict(&[CREATED, FAST], false), KvmVerdict::Broken { .. }));
    assert!(matches!(verdict(&[CREATED, FAST], true), KvmVerdict::Broken { .. }));
    assert!(matches!(verdict(&[], false), KvmVerdict::Broken { .. }));
    assert!(matches!(verdict(&["nonsense"], true), KvmVerdict::Broken { .. }));
}

#[tokio::test]
async fn a_probe_that_hangs_is_killed_in_time() {
    if !Path::new("/dev/kvm").exists() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let helper = dir.path().join("hang");
    std::fs::write(&helper, "#!/bin/sh\nexec sleep 60\n").unwrap();
    std::fs::set_permissions(&helper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let started = std::time::Instant::now();
    let report = probe(&helper, Duration::from_millis(200)).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(matches!(report.verdict, KvmVerdict::Broken { .. } | KvmVerdict::NotPermitted { .. }));
}
