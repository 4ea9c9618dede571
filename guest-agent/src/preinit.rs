//! First process of the guest: from the kernel's hand to systemd on an overlay root.

/// Prepares the root and becomes systemd; never returns.
pub fn run() -> ! {
    std::process::exit(1)
}
