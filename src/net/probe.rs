//! Whether slots can be made here: by making one, in a network namespace that stands in for the host
//! and is thrown away.

use std::io;
use std::net::Ipv4Addr;

use snapshotter::tap;

use super::plan::{CANDIDATES, Plan};
use super::policy::Policy;
use super::slot::Slot;

/// Makes and forgets a slot. Nothing of the host is changed.
///
/// # Errors
/// What is missing: rights, `/dev/net/tun`, nftables, connection tracking.
pub async fn probe() -> io::Result<()> {
    tokio::task::spawn_blocking(attempt).await.map_err(io::Error::other)?
}

fn attempt() -> io::Result<()> {
    let network: Ipv4Addr = CANDIDATES[0];
    let work = || {
        let plan = Plan::new("probe", network, false);
        let slot = Slot::make(&plan, 1, &[])?;
        slot.attach([2, 0, 0, 0, 0, 1])?;
        slot.set_policy(&Policy::default())
    };
    let (_, ()) = tap::new_namespace(work).map_err(|e| match e.raw_os_error() {
        Some(nix::libc::EPERM) => io::Error::new(
            e.kind(),
            "no right to make network namespaces: run as root, or give CAP_NET_ADMIN and \
             CAP_SYS_ADMIN",
        ),
        _ => e,
    })?;
    Ok(())
}
