//! Tap devices, and the network namespaces they are in.
//!
//! A tap opens only to its owner, which matters where Firecracker is nobody. What is done inside a
//! namespace happens on a thread of its own, because a tap is made in the network namespace of the
//! thread that opens `/dev/net/tun`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Layout of the part of `struct ifreq` that tun looks at.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// <linux/if_tun.h>. The numbers say `int` and the kernel takes a pointer or a plain value.
mod ioctl {
    #![allow(missing_docs, reason = "written by macros")]
    use super::InterfaceRequest;

    nix::ioctl_write_ptr_bad!(
        tun_set_interface,
        nix::request_code_write!(b'T', 202, 4),
        InterfaceRequest
    );
    nix::ioctl_write_int_bad!(tun_set_persist, nix::request_code_write!(b'T', 203, 4));
    nix::ioctl_write_int_bad!(tun_set_owner, nix::request_code_write!(b'T', 204, 4));
}

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// Makes a network namespace with nothing in it but the tap `name`, which nothing is connected to.
/// It lasts as long as a process or the descriptor holds it, and the tap with it.
pub(crate) fn lonely(name: &str, owner: u32) -> io::Result<OwnedFd> {
    on_own_thread(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        set_up(name, owner, true)?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    })
}

/// Lets only `owner` open the tap `name`, which somebody made in the namespace `netns`.
pub(crate) fn give(name: &str, netns: Option<&Path>, owner: u32) -> io::Result<()> {
    on_own_thread(|| {
        if let Some(path) = netns {
            enter(&File::open(path)?)?;
        }
        // Otherwise the request below would make it.
        if !exists(name)? {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no tap {name}")));
        }
        set_up(name, owner, false)
    })
}

/// Makes the tap `name` in this thread's namespace. It stays there without anybody having it open,
/// and goes with the namespace.
pub fn create(name: &str) -> io::Result<()> {
    set_up(name, rustix::process::getuid().as_raw(), true)
}

/// Makes a network namespace and runs `f` in it, on a thread of its own. The namespace lasts as long
/// as its descriptor, a process or a socket in it.
pub fn new_namespace<T: Send>(
    f: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<(OwnedFd, T)> {
    on_own_thread(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        let netns = File::open("/proc/thread-self/ns/net")?.into();
        Ok((netns, f()?))
    })
}

/// Has `command` start in the namespace `netns`.
pub fn start_inside(command: &mut Command, netns: OwnedFd) {
    let enter =
        move || Ok(move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?);
    // SAFETY: between fork and exec this makes one system call and allocates nothing.
    unsafe { command.pre_exec(enter) };
}

/// Runs `f` on a thread that is in the namespace `netns`.
pub fn inside<T: Send>(
    netns: &impl AsFd,
    f: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let netns = netns.as_fd();
    on_own_thread(move || {
        enter(&netns)?;
        f()
    })
}

fn enter(netns: &impl AsFd) -> io::Result<()> {
    Ok(move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?)
}

fn exists(name: &str) -> io::Result<bool> {
    // Two header lines, then one interface a line: `  name: numbers`.
    let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    Ok(text.lines().skip(2).filter_map(|l| l.split_once(':')).any(|(n, _)| n.trim() == name))
}

fn set_up(name: &str, owner: u32, persist: bool) -> io::Result<()> {
    let mut request = InterfaceRequest {
        name: [0; 16],
        // As Firecracker asks for it: other flags would make its own request fail.
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() >= request.name.len() {
        let message = format!("{name:?} is no interface name");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    request.name[..bytes.len()].copy_from_slice(bytes);
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    let fd = tun.as_raw_fd();
    // SAFETY: the descriptor is open, and the request is a whole `struct ifreq` (40 bytes).
    unsafe { ioctl::tun_set_interface(fd, &raw const request) }?;
    // SAFETY: takes a plain number.
    unsafe { ioctl::tun_set_owner(fd, owner as nix::libc::c_int) }?;
    if persist {
        // SAFETY: takes a plain number.
        unsafe { ioctl::tun_set_persist(fd, 1) }?;
    }
    Ok(())
}

fn on_own_thread<T: Send>(f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, f)?;
        thread.join().map_err(|_| io::Error::other("the thread in the namespace panicked"))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const _: () = assert!(size_of::<InterfaceRequest>() == 40);

    #[test]
    fn a_lonely_tap_is_alone_and_goes_with_its_namespace() {
        let netns = lonely("tap0", 1_900_000_007).unwrap();
        let names = inside(&netns, || std::fs::read_to_string("/proc/thread-self/net/dev"));
        let names = names.unwrap();
        let names: Vec<&str> = names
            .lines()
            .skip(2)
            .filter_map(|l| l.split_once(':'))
            .map(|(n, _)| n.trim())
            .collect();
        assert!(names.contains(&"tap0") && names.iter().all(|n| ["tap0", "lo"].contains(n)));
        assert!(!exists("tap0").unwrap(), "it is not in the host's namespace");
    }

    #[test]
    fn a_tap_that_is_not_there_is_not_made() {
        let netns = lonely("tap0", 0).unwrap();
        let path = format!("/proc/self/fd/{}", netns.as_raw_fd());
        give("tap0", Some(Path::new(&path)), 1_900_000_007).unwrap();
        let e = give("tap1", Some(Path::new(&path)), 1).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::NotFound);
        let e = give("a-name-that-is-too-long", None, 1).unwrap_err();
        assert!(matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput));
    }
}
