//! First process of the guest: from the kernel's hand to systemd on an overlay root.
//!
//! ```text
//! initramfs:  api mounts -> modules -+
//!                                    +-> disks -> base (ro) + scratch -> overlay -> systemd
//! init= on a read-only root: api mounts -+
//! ```
//!
//! Both ways meet at the disks, which are found by their ext4 label because the order in which a
//! VMM presents them differs. Nothing here starts a process, and every wait has a deadline. A
//! failure prints one line on the console and resets the machine, which ends the VM: a guest that
//! could not build its root must never look like one that is only slow.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Label of the ext4 filesystem all sandboxes share, mounted read-only.
const BASE_LABEL: &str = "rethaw-base";
/// Label of the ext4 filesystem one sandbox writes to.
const SCRATCH_LABEL: &str = "rethaw-scratch";
/// The init system of the base image.
const SYSTEMD: &str = "/lib/systemd/systemd";
/// Where the new root is put together; a tmpfs, so that a read-only old root works too.
const WORK: &str = "/run";
/// Modules of an initramfs and the order to load them in, one file name a line.
const MODULES: &str = "/modules";
/// How long the disks may take to appear. Virtio devices that are there at all are there at once.
const DISK_DEADLINE: Duration = Duration::from_secs(10);
/// Pause between two looks for the disks.
const DISK_POLL: Duration = Duration::from_millis(5);

/// Why the guest could not reach systemd.
#[derive(Debug, thiserror::Error)]
enum PreinitError {
    #[error("mount {what} on {target}: {source}")]
    Mount { what: String, target: String, source: Errno },
    #[error("unmount {target}: {source}")]
    Unmount { target: String, source: Errno },
    #[error("{action} {path}: {source}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("load module {path}: {source}")]
    Module { path: PathBuf, source: io::Error },
    #[error("no disk labelled {missing} after {waited_ms} ms; disks seen: {seen}")]
    DiskMissing { missing: &'static str, waited_ms: u128, seen: String },
    #[error("start {SYSTEMD}: {0}")]
    Exec(io::Error),
}

/// Prepares the root and becomes systemd; never returns.
pub fn run() -> ! {
    let Err(error) = boot();
    report(&format!("rethaw-preinit: boot failed: {error}\n"));
    // SAFETY: both calls take no pointers and touch no memory of this process.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_AUTOBOOT);
    }
    // Only reached when the reset was refused: the end of PID 1 is a kernel panic, also an end.
    std::process::exit(1)
}

/// Prints on the console, through the kernel's log where there is one: that is written out at once,
/// while what goes to the terminal may still be in its buffer when the machine resets.
fn report(line: &str) {
    const CRITICAL: &str = "<2>";
    for (device, prefix) in [("/dev/kmsg", CRITICAL), ("/dev/console", "")] {
        let Ok(mut out) = OpenOptions::new().write(true).open(device) else { continue };
        if out.write_all(format!("{prefix}{line}").as_bytes()).is_ok() {
            return;
        }
    }
}

fn boot() -> Result<Infallible, PreinitError> {
    mount_api_filesystems()?;
    let initramfs = Path::new("/init").exists();
    load_modules(Path::new(MODULES))?;
    let (base, scratch) = wait_for_disks(Instant::now() + DISK_DEADLINE)?;
    let root = build_root(&base, &scratch)?;
    if initramfs {
        free_initramfs();
    }
    switch_root(&root)?;
    let mut systemd = Command::new(SYSTEMD);
    systemd.args(std::env::args_os().skip(1));
    systemd.env_clear().env("TERM", "linux").env("HOME", "/");
    Err(PreinitError::Exec(systemd.exec()))
}

fn mount_api_filesystems() -> Result<(), PreinitError> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    // The kernel may have mounted devtmpfs already; a second one on top is the same one.
    for (kind, target, flags, options) in [
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=755"),
        ("proc", "/proc", safe | MsFlags::MS_NODEV, ""),
        ("sysfs", "/sys", safe | MsFlags::MS_NODEV, ""),
        ("tmpfs", WORK, safe | MsFlags::MS_NODEV, "mode=755"),
    ] {
        // An initramfs has none of the directories; a read-only root has them all.
        let _ = fs::create_dir(target);
        mount_at(kind, Path::new(target), Some(kind), flags, options)?;
    }
    Ok(())
}

fn mount_at(
    what: &str,
    target: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    options: &str,
) -> Result<(), PreinitError> {
    mount(Some(what), target, kind, flags, Some(options)).map_err(|source| PreinitError::Mount {
        what: what.to_owned(),
        target: target.display().to_string(),
        source,
    })
}

/// Loads the modules listed in `dir/order`; a kernel with everything built in has no such file.
fn load_modules(dir: &Path) -> Result<(), PreinitError> {
    let order = dir.join("order");
    let list = match fs::read_to_string(&order) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(file_error("read", &order, source)),
    };
    for name in list.lines().filter(|line| !line.is_empty()) {
        let path = dir.join(name);
        load_module(&path).map_err(|source| PreinitError::Module { path, source })?;
    }
    Ok(())
}

fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let options = CString::default();
    // SAFETY: the descriptor is open for the whole call and the options are a NUL-terminated
    // string; the kernel copies both.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), options.as_ptr(), 0) };
    match Errno::result(result) {
        Ok(_) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Waits until both disks are there, and gives their device nodes: base, scratch.
fn wait_for_disks(deadline: Instant) -> Result<(PathBuf, PathBuf), PreinitError> {
    let started = Instant::now();
    loop {
        let disks = labelled_disks()?;
        let find = |wanted: &str| {
            let found = disks.iter().find(|(_, label)| label == wanted);
            found.map(|(path, _)| path.clone())
        };
        let missing = match (find(BASE_LABEL), find(SCRATCH_LABEL)) {
            (Some(base), Some(scratch)) => return Ok((base, scratch)),
            (None, _) => BASE_LABEL,
            (_, None) => SCRATCH_LABEL,
        };
        if Instant::now() >= deadline {
            let seen: Vec<String> = disks
                .iter()
                .map(|(path, label)| format!("{} ({label:?})", path.display()))
                .collect();
            return Err(PreinitError::DiskMissing {
                missing,
                waited_ms: started.elapsed().as_millis(),
                seen: seen.join(", "),
            });
        }
        sleep(DISK_POLL);
    }
}

/// Every block device with its ext4 label, empty where it has none; sorted by name.
fn labelled_disks() -> Result<Vec<(PathBuf, String)>, PreinitError> {
    let dir = Path::new("/sys/block");
    let entries = fs::read_dir(dir).map_err(|source| file_error("list", dir, source))?;
    let mut disks: Vec<(PathBuf, String)> = entries
        .filter_map(|entry| {
            let path = Path::new("/dev").join(entry.ok()?.file_name());
            let label = File::open(&path).ok().and_then(ext4_label);
            Some((path, label.unwrap_or_default()))
        })
        .collect();
    disks.sort();
    Ok(disks)
}

/// The volume label in an ext4 superblock, or nothing when there is no ext4 on the device.
fn ext4_label(mut device: impl Read + Seek) -> Option<String> {
    const SUPERBLOCK_AT: u64 = 1024;
    const MAGIC: [u8; 2] = 0xEF53_u16.to_le_bytes();
    const MAGIC_AT: usize = 56;
    const LABEL_AT: usize = 120;
    const LABEL_LEN: usize = 16;
    let mut superblock = [0_u8; LABEL_AT + LABEL_LEN];
    device.seek(SeekFrom::Start(SUPERBLOCK_AT)).ok()?;
    device.read_exact(&mut superblock).ok()?;
    if superblock[MAGIC_AT..MAGIC_AT + MAGIC.len()] != MAGIC {
        return None;
    }
    let label = superblock[LABEL_AT..].split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(label).into_owned())
}

/// Mounts base, scratch and the overlay of both; gives the path of the overlay.
fn build_root(base: &Path, scratch: &Path) -> Result<PathBuf, PreinitError> {
    let work = Path::new(WORK);
    let [lower, upper, root] = ["base", "scratch", "root"].map(|name| work.join(name));
    for dir in [&lower, &upper, &root] {
        fs::create_dir(dir).map_err(|source| file_error("make directory", dir, source))?;
    }
    let device = |path: &Path| path.display().to_string();
    let ext4 = Some("ext4");
    mount_at(&device(base), &lower, ext4, MsFlags::MS_RDONLY, "")?;
    // The inode tables of the scratch disk stay unwritten: initialising them in the background
    // would only fill a sparse file and wake the guest for minutes.
    let options = "noinit_itable";
    mount_at(&device(scratch), &upper, ext4, MsFlags::MS_NOATIME, options)?;
    let options = format!(
        "lowerdir={},upperdir={}/upper,workdir={}/work",
        lower.display(),
        upper.display(),
        upper.display()
    );
    mount_at("overlay", &root, Some("overlay"), MsFlags::MS_NOATIME, &options)?;
    // The overlay holds both filesystems by itself; without the two mounts nothing in the guest
    // can write below it.
    for target in [&lower, &upper] {
        unmount(target)?;
    }
    Ok(root)
}

fn unmount(target: &Path) -> Result<(), PreinitError> {
    umount2(target, MntFlags::MNT_DETACH)
        .map_err(|source| PreinitError::Unmount { target: target.display().to_string(), source })
}

/// Gives the memory of the initramfs back; what cannot be removed only costs memory.
fn free_initramfs() {
    let _ = fs::remove_dir_all(MODULES);
    let _ = fs::remove_file("/init");
}

/// Makes `root` the root of this process and takes the API filesystems along.
fn switch_root(root: &Path) -> Result<(), PreinitError> {
    for name in ["dev", "proc", "sys"] {
        let from = Path::new("/").join(name);
        move_mount(&from, &root.join(name))?;
    }
    std::env::set_current_dir(root).map_err(|source| file_error("enter", root, source))?;
    move_mount(root, Path::new("/"))?;
    // This process still has the old root as its root, so this is the old work area: empty now.
    unmount(Path::new(WORK))?;
    std::os::unix::fs::chroot(".").map_err(|source| file_error("chroot to", root, source))?;
    std::env::set_current_dir("/").map_err(|source| file_error("enter", Path::new("/"), source))
}

fn move_mount(from: &Path, to: &Path) -> Result<(), PreinitError> {
    let what = String::from_utf8_lossy(from.as_os_str().as_bytes());
    mount_at(&what, to, None, MsFlags::MS_MOVE, "")
}

fn file_error(action: &'static str, path: &Path, source: io::Error) -> PreinitError {
    PreinitError::File { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn superblock(magic: u16, label: &[u8]) -> Cursor<Vec<u8>> {
        let mut disk = vec![0_u8; 4096];
        disk[1024 + 56..1024 + 58].copy_from_slice(&magic.to_le_bytes());
        disk[1024 + 120..1024 + 120 + label.len()].copy_from_slice(label);
        Cursor::new(disk)
    }

    #[test]
    fn reads_the_label_of_an_ext4_superblock() {
        let label = ext4_label(superblock(0xEF53, b"rethaw-scratch"));
        assert_eq!(label.as_deref(), Some("rethaw-scratch"));
    }

    #[test]
    fn reads_a_label_that_fills_its_field() {
        let label = ext4_label(superblock(0xEF53, b"0123456789abcdef"));
        assert_eq!(label.as_deref(), Some("0123456789abcdef"));
    }

    #[test]
    fn ignores_what_is_not_ext4_or_too_short() {
        assert_eq!(ext4_label(superblock(0xEF54, b"rethaw-base")), None);
        assert_eq!(ext4_label(Cursor::new(vec![0_u8; 1100])), None);
    }

    #[test]
    fn a_kernel_without_modules_has_nothing_to_load() {
        let dir = tempfile::tempdir().expect("temporary directory");
        load_modules(dir.path()).expect("no order file is no error");
    }

    #[test]
    fn a_listed_module_that_is_not_there_is_an_error_with_its_path() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::write(dir.path().join("order"), "gone.ko\n").expect("order file");
        let error = load_modules(dir.path()).expect_err("the module is not there");
        assert!(error.to_string().contains("gone.ko"), "{error}");
    }
}
