//! The link itself, by ioctl. Netlink would tell and take the same, with every counter and setting
//! of the link in each answer; a restore runs this code for the first time, and pays for its length.

use super::DEFAULT_INTERFACE;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// IPv6 addresses of the network this thread is in.
const IF_INET6: &str = "/proc/thread-self/net/if_inet6";
/// More addresses than this are as good as any number: they are then listed by netlink.
const MAX_ADDRESSES: usize = 16;
/// Longest line of the list of IPv6 addresses.
const LINE: usize = 64;

/// The link as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Whether it is up.
    pub up: bool,
    /// Hardware address.
    pub mac: [u8; 6],
}

/// A link, and whether there was no address but the loopback's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The link.
    pub link: Link,
    /// Without addresses.
    pub bare: bool,
}

/// A socket to ask about links.
#[derive(Debug)]
pub struct Links {
    socket: OwnedFd,
    /// Lists IPv6 addresses; a kernel without IPv6 has none.
    inet6: Option<File>,
}

impl Links {
    /// Opens it.
    ///
    /// # Errors
    /// No IPv4 in this kernel, or no descriptors left.
    pub fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
        let inet6 = match File::open(IF_INET6) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            result => Some(result?),
        };
        Ok(Self { socket, inet6 })
    }

    /// The link of this name.
    ///
    /// # Errors
    /// There is none: `ENODEV`.
    pub fn get(&self, name: &str) -> io::Result<Link> {
        let mut request = request(name)?;
        self.call(libc::SIOCGIFHWADDR, &mut request)?;
        let mut mac = [0; 6];
        // SAFETY: SIOCGIFHWADDR has filled in this member.
        let data = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_data;
        for (byte, value) in mac.iter_mut().zip(data) {
            *byte = value as u8;
        }
        self.call(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS has filled in this member.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        self.call(libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: SIOCGIFINDEX has filled in this member.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        Ok(Link { index: index as u32, up: flags & libc::IFF_UP != 0, mac })
    }

    /// The usual link and whether it has addresses.
    ///
    /// # Errors
    /// There is none: `ENODEV`.
    pub fn look(&self) -> io::Result<Seen> {
        let link = self.get(DEFAULT_INTERFACE)?;
        Ok(Seen { link, bare: self.without_addresses(link.index)? })
    }

    /// Gives the link another hardware address, without taking it down.
    ///
    /// # Errors
    /// What the driver says.
    pub fn set_mac(&self, name: &str, mac: [u8; 6]) -> io::Result<()> {
        let mut request = request(name)?;
        // SAFETY: an all-zero sockaddr is valid.
        let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
        address.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in address.sa_data.iter_mut().zip(mac) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_hwaddr = address;
        self.call(libc::SIOCSIFHWADDR, &mut request)
    }

    /// Whether no link but the loopback has an IPv4 address, and the link of this number no IPv6
    /// address: then there is nothing of another machine's to take away.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn without_addresses(&self, index: u32) -> io::Result<bool> {
        Ok(!self.any_ipv4()? && !self.any_ipv6(index)?)
    }

    fn any_ipv4(&self) -> io::Result<bool> {
        // SAFETY: all-zero requests are valid.
        let mut list: [libc::ifreq; MAX_ADDRESSES] = unsafe { std::mem::zeroed() };
        let room = size_of_val(&list) as libc::c_int;
        let mut answer = libc::ifconf {
            ifc_len: room,
            ifc_ifcu: libc::__c_anonymous_ifc_ifcu { ifcu_req: list.as_mut_ptr() },
        };
        // SAFETY: the kernel writes at most `ifc_len` bytes to `list`, which has as many.
        let result =
            unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFCONF, &raw mut answer) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let count = answer.ifc_len as usize / size_of::<libc::ifreq>();
        let outside = |request: &libc::ifreq| {
            // SAFETY: SIOCGIFCONF has filled in this member, with a sockaddr_in: two bytes of
            // port, then the address.
            unsafe { request.ifr_ifru.ifru_addr }.sa_data[2] != 127
        };
        // A full list may not be the whole one.
        Ok(count >= MAX_ADDRESSES || list.iter().take(count).any(outside))
    }

    fn any_ipv6(&self, index: u32) -> io::Result<bool> {
        let Some(inet6) = &self.inet6 else { return Ok(false) };
        let mut text = [0; MAX_ADDRESSES * LINE];
        // From the start: the kernel then makes the list anew.
        let n = inet6.read_at(&mut text, 0)?;
        let mut lines = text[..n].split(|b| *b == b'\n');
        Ok(n == text.len() || lines.any(|line| if_inet6_index(line) == Some(index)))
    }

    fn call(&self, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: the requests used here read and write one ifreq, whose name ends with a zero.
        if unsafe { libc::ioctl(self.socket.as_raw_fd(), number, std::ptr::from_mut(request)) } < 0
        {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// The link a line is about: its second field, hexadecimal.
fn if_inet6_index(line: &[u8]) -> Option<u32> {
    let field = line.split(|b| *b == b' ').nth(1)?;
    u32::from_str_radix(std::str::from_utf8(field).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_found_and_others_are_not() {
        let links = Links::open().unwrap();
        let lo = links.get("lo").unwrap();
        assert_eq!((lo.index, lo.mac), (1, [0; 6]));
        let missing = links.get("rethaw-none").unwrap_err();
        assert_eq!(missing.raw_os_error(), Some(libc::ENODEV));
        assert!(links.get("a-name-that-is-too-long").is_err());
    }

    #[test]
    fn lines_of_if_inet6() {
        let line = b"fe80000000000000000000fffe000001 1f 40 20 80     eth0";
        assert_eq!(if_inet6_index(line), Some(0x1f));
        assert_eq!(if_inet6_index(b""), None);
    }
}
