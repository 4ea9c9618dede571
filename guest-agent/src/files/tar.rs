//! Folders as tar archives: `GET /files` of a folder writes one, `PUT /files` with the content type
//! of one unpacks it. POSIX pax for what does not fit the old header; GNU long names are understood.

mod header;
mod pack;
mod target;
mod unpack;

pub use pack::pack;
pub use unpack::unpack;

/// Content type that asks for, or announces, an archive.
pub const CONTENT_TYPE: &str = "application/x-tar";
