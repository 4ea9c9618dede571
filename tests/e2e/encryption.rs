//! What a paused workspace leaves on disk is noise without its key, and its key goes first.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::death::{FILL, SUM};
use crate::home::Home;
use crate::service::Service;

/// Turns each hex digit into another one, and back.
const TURN: &str = "tr 0123456789abcdef fedcba9876543210";

/// Bytes that are nowhere but in the guest, which gets them turned.
fn marker() -> (String, String) {
    let number = u128::from_le_bytes(rand_bytes());
    (format!("{number:032x}"), format!("{:032x}", !number))
}

fn rand_bytes() -> [u8; 16] {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

/// Files below `dir` that hold these bytes; links are not followed.
fn holding(dir: &Path, bytes: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            found.extend(holding(&entry.path(), bytes));
        } else if kind.is_file() && file_holds(&entry.path(), bytes) {
            found.push(entry.path());
        }
    }
    found
}

fn file_holds(path: &Path, bytes: &[u8]) -> bool {
    use std::io::Read;
    let Ok(mut file) = std::fs::File::open(path) else { return false };
    let mut room = vec![0; 4 << 20];
    let mut kept = 0;
    loop {
        let n = file.read(&mut room[kept..]).unwrap();
        if n == 0 {
            return false;
        }
        let all = &room[..kept + n];
        if memchr::memmem::find(all, bytes).is_some() {
            return true;
        }
        let keep = bytes.len().min(all.len());
        room.copy_within(kept + n - keep..kept + n, 0);
        kept = keep;
    }
}

#[tokio::test]
async fn the_disk_holds_no_plaintext_and_pages_come_back_through_every_crash() {
    let mut service = Service::start(0).await;
    let home = service.home().path().to_owned();
    let id = service.create().await;
    let sum = service.sh(&id, FILL).await;
    let (text, turned) = marker();
    let write = format!(
        "m=$(echo {turned} | {TURN}); for n in $(seq 4096); do echo $m; done > /dev/shm/m; \
         cp /dev/shm/m /root/m; sync"
    );
    service.sh(&id, &write).await;
    let lines = async |service: &Service| {
        let script =
            format!("m=$(echo {turned} | {TURN}); grep -c $m /dev/shm/m; grep -c $m /root/m");
        service.sh(&id, &script).await
    };
    // It is found where it must be: the disk of a running VM.
    let disk = service.home().vm_dir(&id).join("scratch.img");
    assert_eq!(holding(&home, text.as_bytes()), [disk]);
    service.act(&id, "pause", &json!({})).await.expect(200);
    assert_eq!(holding(&home, text.as_bytes()), Vec::<PathBuf>::new(), "plaintext on disk");

    // Pages are decrypted as they are asked for, whoever serves them.
    service.act(&id, "resume", &json!({})).await.expect(200);
    let pager = service.home().pager().unwrap();
    pager.kill();
    assert_eq!(lines(&service).await, "4096\n4096");
    assert_ne!(service.home().pager().map(|p| p.pid), Some(pager.pid));
    service.crash().await;
    service.start_again().await;
    assert_eq!(service.sh(&id, SUM).await, sum, "after the service was killed");
    service.act(&id, "pause", &json!({})).await.expect(200);
    service.act(&id, "resume", &json!({})).await.expect(200);
    service.crash().await;
    service.home().pager().unwrap().kill();
    service.start_again().await;
    assert_eq!(service.sh(&id, SUM).await, sum, "after both were killed");
    assert_eq!(lines(&service).await, "4096\n4096");

    // The master key is what opens it all.
    service.act(&id, "pause", &json!({})).await.expect(200);
    service.terminate().await;
    let (master, away) = (home.join("master-key"), home.join("away"));
    std::fs::rename(&master, &away).unwrap();
    service.start_again().await;
    service.act(&id, "resume", &json!({})).await.refused(503, "key_unavailable");
    assert_eq!(service.sandbox(&id).await.expect(200)["state"], "paused");
    service.terminate().await;
    std::fs::rename(&away, &master).unwrap();
    service.start_again().await;
    service.act(&id, "resume", &json!({})).await.expect(200);
    assert_eq!(lines(&service).await, "4096\n4096");

    // The key is destroyed before the files are: whoever has those has noise.
    service.act(&id, "pause", &json!({})).await.expect(200);
    let key = home.join("keys").join(&id);
    assert!(key.exists());
    service.crash().await;
    service.start_again_with(&[("RETHAW_FAILPOINT", "delete.key_destroyed")]).await;
    service.client().post_unanswered(&format!("DELETE /v1/sandboxes/{id}"), &json!({})).await;
    service.died().await;
    assert!(!key.exists());
    let golden = crate::home::golden_snapshots(&home).len();
    let stored = || std::fs::read_dir(home.join("snapshots")).unwrap().count();
    assert!(stored() > golden, "the files are still there");
    service.start_again().await;
    service.sandbox(&id).await.refused(404, "sandbox_not_found");
    assert_eq!(stored(), golden);
    service.stop().await;
}

#[tokio::test]
async fn clones_have_keys_of_their_own_and_a_command_may_keep_them() {
    let home = Home::new().await;
    let script = home.path().join("kms");
    let text = format!("echo \"$@\" >> \"$0.log\"; test ! -e \"$0.down\" && {TURN}");
    std::fs::write(&script, text).unwrap();
    let command = format!("sh {}", script.display());
    let deadline = crate::client::DEADLINE;
    let service = Service::start_on(home, 0, &["--key-command", &command], deadline).await;
    let home = service.home().path().to_owned();
    assert!(!home.join("master-key").exists());
    let source = service.create().await;
    let sum = service.sh(&source, FILL).await;
    // Without the command there is no key, and without a key nothing is written: it runs on.
    std::fs::write(home.join("kms.down"), "").unwrap();
    service.act(&source, "pause", &json!({})).await.refused(503, "key_unavailable");
    assert_eq!(service.sh(&source, SUM).await, sum);
    std::fs::remove_file(home.join("kms.down")).unwrap();

    service.act(&source, "pause", &json!({})).await.expect(200);
    service.act(&source, "resume", &json!({})).await.expect(200);
    let reply = service.act(&source, "fork", &json!({})).await.expect(201);
    let clone = crate::service::id(&reply["items"][0]);
    service.act(&clone, "pause", &json!({})).await.expect(200);
    // Destroying the source's key takes nothing from the clone.
    service.client().delete(&format!("/v1/sandboxes/{source}")).await;
    service.act(&clone, "resume", &json!({})).await.expect(200);
    assert_eq!(service.sh(&clone, SUM).await, sum);
    let keys = std::fs::read_dir(home.join("keys")).unwrap().flatten();
    let keys: Vec<_> = keys.map(|e| e.file_name().into_string().unwrap()).collect();
    assert_eq!(keys, [clone.as_str()], "the fork's key went with its snapshot");
    let log = std::fs::read_to_string(home.join("kms.log")).unwrap();
    assert!(log.contains(&format!("wrap {source}")), "{log}");
    assert!(log.contains(&format!("unwrap {clone}")), "{log}");
    service.stop().await;
}
