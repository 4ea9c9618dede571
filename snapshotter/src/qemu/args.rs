//! QEMU's command line: one machine definition for boot and restore, which must agree on every
//! device or the device state does not load.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::host::Accelerator;
use crate::vmm::{MachineSize, Nic};

/// Name of the virtio-serial port the guest agent listens on.
pub const AGENT_PORT: &str = "rethaw.agent";

/// Descriptor numbers in the child.
pub const QMP_FD: i32 = 3;
/// Listening socket of the agent's port.
pub const AGENT_FD: i32 = 4;
/// Guest memory (memfd), restore through the page server only.
pub const MEMORY_FD: i32 = 5;
/// Device state, restore only.
pub const VMSTATE_FD: i32 = 6;
/// Listening socket of the line monitor, restore only.
pub const LINE_FD: i32 = 7;

/// The line monitor. No part of the machine: device state loads with and without it.
pub fn line_monitor() -> [String; 4] {
    let socket = format!("socket,id=line,fd={LINE_FD},server=on,wait=off");
    ["-chardev".to_owned(), socket, "-mon".to_owned(), "chardev=line,mode=readline".to_owned()]
}

/// The emulated CPU: everything the emulator has, less what only costs under emulation. Five-level
/// page tables lengthen every walk; SMAP and SMEP put mode switches around every copy from user
/// space, and each ends a block of translated code.
const TCG_CPU: &str = "max,la57=off,smap=off,smep=off,pku=off,umip=off";

/// Where guest memory comes from.
#[derive(Debug, Clone, Copy)]
pub enum Memory<'a> {
    /// A file, shared: a snapshot then has it already.
    SharedFile(&'a Path),
    /// An inherited memfd, shared.
    Memfd,
    /// A private mapping of a snapshot's memory file.
    PrivateFile(&'a Path),
}

/// Starts from a kernel, or waits for device state.
#[derive(Debug, Clone, Copy)]
pub enum Start<'a> {
    /// Kernel, initramfs, command line.
    Kernel(&'a Path, Option<&'a Path>, &'a str),
    /// `-incoming defer`.
    Incoming,
}

/// Everything the command line depends on.
#[derive(Debug)]
pub struct Machine<'a> {
    /// How guest code is executed.
    pub accelerator: Accelerator,
    /// vCPUs and memory.
    pub size: MachineSize,
    /// Where memory comes from.
    pub memory: Memory<'a>,
    /// Shared base image.
    pub root_disk: &'a Path,
    /// Writable disk.
    pub scratch_disk: &'a Path,
    /// The NIC.
    pub nic: &'a Nic,
    /// Serial console output goes here; only a booting VM has one.
    pub console: Option<&'a Path>,
    /// How it starts.
    pub start: Start<'a>,
}

/// The machine definition with everything that may differ between two VMs left out: device state
/// written under one definition does not load under another, and a guest may not survive another
/// CPU even where the state does load.
pub fn fingerprint(accelerator: Accelerator) -> String {
    let size = MachineSize { vcpus: 1, memory_bytes: 2 << 20 };
    let none = Path::new("-");
    let machine = Machine {
        accelerator,
        size,
        memory: Memory::Memfd,
        root_disk: none,
        scratch_disk: none,
        nic: &Nic { tap: None, netns: None },
        console: None,
        start: Start::Incoming,
    };
    let digest = hex::encode(Sha256::digest(machine.args().join(" ")));
    format!("microvm-{}", &digest[..16])
}

/// Commas separate options in QEMU's syntax; a comma in a value is doubled.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

impl Machine<'_> {
    /// The arguments, without the program name.
    pub fn args(&self) -> Vec<String> {
        let mut a: Vec<String> = Vec::with_capacity(64);
        let mut push = |items: &[&str]| a.extend(items.iter().map(|s| (*s).to_owned()));
        let bytes = self.size.memory_bytes;
        let accel = match self.accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        };
        let cpu = match self.accelerator {
            Accelerator::Kvm => "host",
            Accelerator::Tcg => TCG_CPU,
        };
        let machine = format!("microvm,accel={accel},rtc=on,acpi=on,memory-backend=mem");
        let object = match self.memory {
            Memory::SharedFile(path) => format!(
                "memory-backend-file,id=mem,size={bytes},share=on,mem-path={}",
                escaped(path)
            ),
            Memory::Memfd => format!(
                "memory-backend-file,id=mem,size={bytes},share=on,mem-path=/proc/self/fd/{MEMORY_FD}"
            ),
            Memory::PrivateFile(path) => format!(
                "memory-backend-file,id=mem,size={bytes},share=off,mem-path={}",
                escaped(path)
            ),
        };
        push(&["-nodefaults", "-no-user-config", "-display", "none"]);
        // A guest that reboots is a guest that is gone; the service sees the exit.
        push(&["-no-reboot", "-name", "rethaw,process=rethaw-qemu"]);
        push(&["-M", &machine, "-cpu", cpu, "-object", &object]);
        push(&["-smp", &self.size.vcpus.to_string()]);
        push(&["-m", &format!("{bytes}b").replace('b', "B")]);
        push(&["-chardev", &format!("socket,id=qmp,fd={QMP_FD},server=on,wait=off")]);
        push(&["-mon", "chardev=qmp,mode=control"]);
        match self.console {
            Some(path) => {
                push(&["-chardev", &format!("file,id=console,path={}", escaped(path))]);
            }
            // The device must exist as it did at boot; its output goes nowhere.
            None => push(&["-chardev", "null,id=console"]),
        }
        push(&["-serial", "chardev:console"]);
        push(&["-drive", &self.drive("root", self.root_disk, true)]);
        push(&["-device", "virtio-blk-device,drive=root"]);
        push(&["-drive", &self.drive("scratch", self.scratch_disk, false)]);
        push(&["-device", "virtio-blk-device,drive=scratch"]);
        push(&["-device", "virtio-serial-device"]);
        push(&["-chardev", &format!("socket,id=agent,fd={AGENT_FD},server=on,wait=off")]);
        push(&["-device", &format!("virtserialport,chardev=agent,name={AGENT_PORT}")]);
        if let Some(tap) = &self.nic.tap {
            // Without the header that carries offloads: a machine saved with it would load on no
            // other kind of network.
            let tap = format!("tap,id=net,ifname={tap},script=no,downscript=no,vnet_hdr=off");
            push(&["-netdev", &tap]);
        } else {
            // A network without any other member: the NIC is there, the cable is not.
            push(&["-netdev", "hubport,id=net,hubid=0"]);
        }
        // Offloads depend on the host side of the NIC; without them a snapshot made on one kind of
        // network loads on any other.
        push(&[
            "-device",
            "virtio-net-device,netdev=net,mac=02:00:00:00:00:01,csum=off,guest_csum=off,gso=off,\
             guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off,host_tso4=off,\
             host_tso6=off,host_ecn=off,host_ufo=off,guest_announce=off",
        ]);
        push(&["-device", "virtio-rng-device"]);
        match self.start {
            Start::Kernel(kernel, initrd, cmdline) => {
                push(&["-kernel", &kernel.to_string_lossy(), "-append", cmdline]);
                if let Some(initrd) = initrd {
                    push(&["-initrd", &initrd.to_string_lossy()]);
                }
            }
            Start::Incoming => push(&["-S", "-incoming", "defer"]),
        }
        a
    }

    fn drive(&self, id: &str, path: &Path, read_only: bool) -> String {
        let ro = if read_only { "on" } else { "off" };
        // The base is shared by VMs that only read it; QEMU's own locks would refuse nothing there
        // and cost two system calls a start. The scratch disk keeps them: two writers is a bug.
        let locking = if read_only { "off" } else { "on" };
        format!(
            "id={id},if=none,format=raw,cache.direct=off,cache.no-flush=on,discard=unmap,\
             read-only={ro},file.locking={locking},file.filename={}",
            escaped(path)
        )
    }
}
