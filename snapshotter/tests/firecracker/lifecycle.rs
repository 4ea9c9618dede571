//! Boot, snapshot, restore, kill.

use snapshotter::vmm::{Driver, MemoryBackend, VmmKind};

use crate::rig::{Rig, wait_for_rounds};

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
