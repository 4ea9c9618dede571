//! Page server for lazily restored microVM memory, and the service's side of it.
//!
//! A restored VM starts with none of its memory in place. Its VMM hands over a userfaultfd in a
//! [`handshake`]; the service passes it on through its [`supervisor`] to `rethaw-pager`, one
//! process for all VMs of a host, whose inside is [`pager`]. Saved pages come from a chain of
//! layers ([`source`]), in advance for those in the [`working_set`].
//!
//! Whatever process is killed, no page is ever answered with anything but its contents: the
//! service holds every descriptor and the [`vm_state`] a second time, and the next page server
//! goes on where the last one stopped.

pub mod bitmap;
pub mod control;
pub mod fdpass;
pub mod handshake;
pub mod log_file;
pub mod pager;
pub mod pidfd;
pub mod region;
pub mod rights;
pub mod sched;
pub mod seal;
pub mod sealed_file;
pub mod source;
pub mod stats;
pub mod supervisor;
pub mod uffd;
pub mod vm_state;
pub mod working_set;
