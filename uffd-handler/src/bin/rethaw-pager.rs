//! The page server process.
fn main() {}
