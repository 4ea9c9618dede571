//! rethaw: keeps microVM sandboxes warm.
fn main() {}
