//! Boot, snapshot, restore, kill.

use std::time::{Duration, Instant};

use guest_agent::client::AgentError;
use snapshotter::firecracker::api::CpuTemplate;
use snapshotter::vmm::{Driver, MemoryBackend, VmmKind};

use crate::rig::{PATIENCE, Rig, console, wait_for_rounds};

async fn there_and_back(jailed: bool, backend: MemoryBackend) {
    let rig = Rig::new(jailed).await;
    let golden = rig.golden().await;
    let spec = rig.restore_spec(&golden, backend);
    let shell = rig.driver.prepare(&spec).await.unwrap();
    let record = shell.record();
    assert_eq!((record.vmm, &record.id), (VmmKind::Firecracker, &spec.id));
    let (vm, phases) = shell.load().await.unwrap();
    println!("{phases:?}");
    vm.resume().await.unwrap();
    wait_for_rounds(&spec.run_dir, 3).await;
    vm.kill().await;
    rig.assert_gone(&spec.id, &spec.run_dir);
}

#[tokio::test(flavor = "multi_thread")]
async fn unjailed_from_a_file() {
    there_and_back(false, MemoryBackend::File).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unjailed_through_the_page_server() {
    there_and_back(false, MemoryBackend::Uffd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jailed_from_a_file() {
    there_and_back(true, MemoryBackend::File).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jailed_through_the_page_server() {
    there_and_back(true, MemoryBackend::Uffd).await;
}

/// Firecracker takes the host's `CONNECT` and says nothing until the guest does: here never.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_without_an_agent_is_given_up_at_the_deadline() {
    let rig = Rig::new(true).await;
    let golden = rig.golden().await;
    let spec = rig.restore_spec(&golden, MemoryBackend::Uffd);
    let vm = rig.restore(&spec).await;
    let deadline = Duration::from_millis(900);
    let started = Instant::now();
    let e = vm.connect_agent(deadline).await.unwrap_err();
    assert!(matches!(e, AgentError::Timeout { .. }), "{e}");
    assert!(started.elapsed() >= deadline && started.elapsed() < PATIENCE, "{e}");
    // Which does the VM itself no harm.
    let so_far = console(&spec.run_dir).matches('.').count();
    wait_for_rounds(&spec.run_dir, so_far + 2).await;
    vm.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cpu_template_is_given_to_firecracker() {
    let empty = serde_json::json!({ "cpuid_modifiers": [], "msr_modifiers": [] });
    let rig = Rig::with(|config| config.cpu_template = Some(CpuTemplate(empty))).await;
    rig.golden().await;
    let wrong = serde_json::json!({ "cpuid_modifiers": "none" });
    let rig = Rig::with(|config| config.cpu_template = Some(CpuTemplate(wrong))).await;
    let spec = rig.boot_spec();
    let e = rig.driver.boot(&spec).await.unwrap_err();
    assert!(e.to_string().contains("/cpu-config"), "{e}");
    rig.assert_gone(&spec.id, &spec.run_dir);
}
