//! The bell: rung at every change that a viewer could see.

use std::sync::LazyLock;

use tokio::sync::watch;

static BELL: LazyLock<watch::Sender<u64>> = LazyLock::new(|| watch::Sender::new(0));

/// Something that a viewer can see has changed. What it is the viewers find out themselves, so that
/// a hundred changes at once cost each of them one look.
pub fn changed() {
    BELL.send_modify(|n| *n = n.wrapping_add(1));
}

/// Hears every ring from now on.
pub fn listen() -> watch::Receiver<u64> {
    BELL.subscribe()
}
