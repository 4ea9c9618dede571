//! Encrypted layers: served lazily, with keys that page servers get and hand on in memory only.

#![allow(clippy::unwrap_used, reason = "tests and benchmarks fail by panicking")]

mod rig;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rig::fake_vmm::Command;
use rig::oracle;
use uffd_handler::seal::{Key, KeySource, NoKeys, SealError};
use uffd_handler::source::{DeltaWriter, LayerFiles};
use uffd_handler::supervisor::{AddVmError, MemoryPlan, PagerEvent, Supervisor};

const PAGES: u64 = 64;

#[derive(Debug)]
struct OneKey(Key);

impl KeySource for OneKey {
    fn key(&self, id: &str) -> Result<Key, SealError> {
        assert_eq!(id, "the-key");
        Ok(self.0.clone())
    }
}

/// A memory with some changed pages, encrypted.
fn plan(dir: &Path, key: &Key) -> MemoryPlan {
    oracle::write_memory(&dir.join("memory"), 7, PAGES);
    let (data, index) = (dir.join("d"), dir.join("d.index"));
    let mut writer = DeltaWriter::create_with(&data, &index, PAGES, Some(key)).unwrap();
    for page in [3, 4, 5, 20] {
        writer.page(page, &oracle::written(page)).unwrap();
    }
    writer.page(30, &[0; 4096]).unwrap();
    writer.finish().unwrap();
    let mut plan = MemoryPlan::flat(dir.join("memory"), None);
    plan.layers.push(LayerFiles::EncryptedDelta { data, index, key: "the-key".to_owned() });
    plan
}

fn supervisor(dir: &Path, keys: Arc<dyn KeySource>) -> Supervisor {
    let mut config = rig::config(dir);
    config.state_dir = Some(dir.join("state"));
    std::fs::create_dir_all(dir.join("state")).unwrap();
    config.keys = keys;
    Supervisor::start(config).unwrap()
}

#[test]
fn pages_are_decrypted_by_whichever_page_server_serves() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let key = Key::generate().unwrap();
    let plan = plan(dir, &key);
    let first = supervisor(dir, Arc::new(OneKey(key.clone())));
    let events = first.events();
    let (vmm, handshake) = rig::start(&rig::setup(dir, "vm", &[PAGES]));
    first.add_vm("vm", handshake, &plan).unwrap();
    let mut cpu = vmm.cpu();
    let written = |page: u64| crc32fast::hash(&oracle::written(page));
    assert_eq!(cpu.read(3), written(3));
    assert_eq!(cpu.read(6), crc32fast::hash(&oracle::template(7, 6)));
    first.replace_pager();
    assert!(matches!(
        events.recv_timeout(rig::DEADLINE).unwrap(),
        PagerEvent::PagerRestarted { vms: 1, .. }
    ));
    assert_eq!(cpu.read(4), written(4));
    // Nothing that was written down holds the key.
    for file in std::fs::read_dir(dir.join("state")).unwrap().flatten() {
        let text = std::fs::read(file.path()).unwrap();
        assert!(!text.windows(32).any(|w| w == key.expose()), "{:?}", file.path());
    }
    let layers = first.memory_layers("vm").unwrap();
    let mut page = [0; 4096];
    layers.read_page(20, &mut page).unwrap();
    assert_eq!(crc32fast::hash(&page), written(20));
    // The next service has no keys at all: those in use come back from the page server.
    drop(first);
    let second = supervisor(dir, Arc::new(NoKeys));
    assert_eq!(second.adopted(), ["vm"]);
    assert_eq!(cpu.read(5), written(5));
    let events = second.events();
    second.replace_pager();
    assert!(matches!(
        events.recv_timeout(rig::DEADLINE).unwrap(),
        PagerEvent::PagerRestarted { vms: 1, .. }
    ));
    assert_eq!(cpu.read(20), written(20));
    assert_eq!(cpu.read(30), crc32fast::hash(&[0; 4096]));
    drop(vmm);
    second.remove_vm("vm");
    second.shutdown();
}

#[test]
fn without_the_key_or_with_a_changed_page_there_is_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let key = Key::generate().unwrap();
    let plan = plan(dir, &key);
    let none = supervisor(dir, Arc::new(NoKeys));
    let (_vmm, handshake) = rig::start(&rig::setup(dir, "none", &[PAGES]));
    let outcome = none.add_vm("vm", handshake, &plan);
    assert!(matches!(outcome, Err(AddVmError::Plan(_))), "{outcome:?}");
    none.shutdown();
    let other = supervisor(dir, Arc::new(OneKey(Key::generate().unwrap())));
    let (_vmm, handshake) = rig::start(&rig::setup(dir, "other", &[PAGES]));
    let outcome = other.add_vm("vm", handshake, &plan);
    assert!(matches!(outcome, Err(AddVmError::Refused { .. })), "{outcome:?}");
    other.shutdown();

    // Two pages of the file change places: both are what was written, and neither is taken.
    let file = std::fs::File::options().read(true).write(true).open(dir.join("d")).unwrap();
    let (mut one, mut two) = ([0; 4096], [0; 4096]);
    file.read_exact_at(&mut one, 0).unwrap();
    file.read_exact_at(&mut two, 4096).unwrap();
    file.write_all_at(&two, 0).unwrap();
    file.write_all_at(&one, 4096).unwrap();
    drop(file);
    let right = supervisor(dir, Arc::new(OneKey(key)));
    let events = right.events();
    let (vmm, handshake) = rig::start(&rig::setup(dir, "right", &[PAGES]));
    right.add_vm("vm", handshake, &plan).unwrap();
    let mut cpu = vmm.cpu();
    assert_eq!(cpu.read(5), crc32fast::hash(&oracle::written(5)));
    cpu.send(&Command::Read { page: 3 });
    let lost = events.recv_timeout(rig::DEADLINE).unwrap();
    assert!(
        matches!(&lost, PagerEvent::VmLost { reason, .. } if reason.contains("damaged")),
        "{lost:?}"
    );
    drop(vmm);
    right.remove_vm("vm");
    right.shutdown();
}
