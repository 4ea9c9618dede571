//! An archive becomes files, as it arrives.
//!
//! ```text
//! header -> contents -> padding -> header ... -> end (two blocks of zeros, or the end of the body)
//!    \----> long name or pax records, kept for the next header
//! ```

use super::header::{BLOCK, Header, Kind};
use super::target::{Target, Unfinished, inside};
use crate::files::AbsolutePath;
use crate::files::write::Ownership;
use crate::server::{Answer, ApiError, json};
use crate::wire::codes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Pax records and long names are never longer than this.
const MAX_EXTENSION: u64 = 64 * 1024;

enum State {
    Header,
    Contents { left: u64, into: Option<Unfinished>, extension: Option<Kind> },
    Padding { left: usize },
    End,
}

/// Takes an archive's bytes in pieces of any size.
struct Unpacker {
    target: Target,
    state: State,
    /// A header, or an extension, that has not come whole yet.
    partial: Vec<u8>,
    pax: Vec<u8>,
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: u64,
}

fn malformed(message: impl std::fmt::Display) -> ApiError {
    ApiError::new(400, codes::INVALID_REQUEST, format!("the archive: {message}"))
}

fn escapes(path: &[u8]) -> ApiError {
    let path = String::from_utf8_lossy(path);
    ApiError::new(400, codes::ENTRY_ESCAPES, format!("entry {path:?} would land outside"))
}

impl Unpacker {
    fn take(&mut self, mut data: &[u8]) -> Result<(), ApiError> {
        while !data.is_empty() {
            match &mut self.state {
                State::End => return Ok(()),
                State::Padding { left } => {
                    let n = data.len().min(*left);
                    *left -= n;
                    data = &data[n..];
                    if *left == 0 {
                        self.state = State::Header;
                    }
                }
                State::Header => {
                    let n = data.len().min(BLOCK - self.partial.len());
                    self.partial.extend(&data[..n]);
                    data = &data[n..];
                    if let Ok(block) = <[u8; BLOCK]>::try_from(self.partial.as_slice()) {
                        self.partial.clear();
                        self.entry(&block)?;
                    }
                }
                State::Contents { left, into, extension } => {
                    let n = usize::try_from(*left).unwrap_or(usize::MAX).min(data.len());
                    match (into, extension) {
                        (Some(into), _) => into
                            .file
                            .write_all(&data[..n])
                            .map_err(|e| ApiError::from_io(&e, "unpack"))?,
                        (None, Some(_)) => self.partial.extend(&data[..n]),
                        (None, None) => {}
                    }
                    *left -= n as u64;
                    data = &data[n..];
                    if *left == 0 {
                        self.finish()?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The contents are whole.
    fn finish(&mut self) -> Result<(), ApiError> {
        let padding = (BLOCK - (self.size % BLOCK as u64) as usize) % BLOCK;
        let next = if padding == 0 { State::Header } else { State::Padding { left: padding } };
        if let State::Contents { into, extension, .. } = std::mem::replace(&mut self.state, next) {
            if let Some(into) = into {
                into.keep().map_err(|e| ApiError::from_io(&e, "unpack"))?;
            }
            let mut text = std::mem::take(&mut self.partial);
            match extension {
                Some(Kind::Pax) => self.pax = text,
                Some(kind) => {
                    // GNU ends its long names with a NUL.
                    text.truncate(memchr::memchr(0, &text).unwrap_or(text.len()));
                    if kind == Kind::GnuName {
                        self.name = Some(text);
                    } else {
                        self.link = Some(text);
                    }
                }
                None => {}
            }
        }
        Ok(())
    }

    fn entry(&mut self, block: &[u8; BLOCK]) -> Result<(), ApiError> {
        let Some(mut header) = Header::parse(block).map_err(malformed)? else {
            self.state = State::End;
            return Ok(());
        };
        if matches!(header.kind, Kind::Pax | Kind::GnuName | Kind::GnuLink) {
            if header.size > MAX_EXTENSION {
                return Err(malformed(format!("an extension of {} bytes", header.size)));
            }
            return self.contents(header.size, None, Some(header.kind));
        }
        header.extend(&std::mem::take(&mut self.pax)).map_err(malformed)?;
        header.path = self.name.take().unwrap_or(header.path);
        header.link = self.link.take().unwrap_or(header.link);
        if header.kind == Kind::Other {
            return self.contents(header.size, None, None);
        }
        let path = inside(&header.path).ok_or_else(|| escapes(&header.path))?;
        let failed = |e: std::io::Error| match e.raw_os_error() {
            Some(libc::EXDEV) => escapes(&header.path),
            _ => ApiError::from_io(&e, &String::from_utf8_lossy(&header.path)),
        };
        let target = &self.target;
        match header.kind {
            Kind::File => {
                let file = target.file(&path, header.mode).map_err(failed)?;
                return self.contents(header.size, Some(file), None);
            }
            Kind::Directory => {
                target.make_folder(&path, header.mode | 0o700).map_err(failed)?;
            }
            Kind::Symlink => {
                let link = Path::new(OsStr::from_bytes(&header.link));
                target.symlink(&path, link).map_err(failed)?;
            }
            _ => {
                let existing = inside(&header.link).ok_or_else(|| escapes(&header.link))?;
                target.hard_link(&path, &existing).map_err(failed)?;
            }
        }
        // Links and folders have no contents, whatever their header says about a size.
        self.contents(0, None, None)
    }

    fn contents(
        &mut self,
        size: u64,
        into: Option<Unfinished>,
        extension: Option<Kind>,
    ) -> Result<(), ApiError> {
        self.size = size;
        self.state = State::Contents { left: size, into, extension };
        if size == 0 { self.finish() } else { Ok(()) }
    }

    /// The body is over.
    fn end(&self) -> Result<(), ApiError> {
        match self.state {
            State::End => Ok(()),
            State::Header if self.partial.is_empty() => Ok(()),
            _ => Err(malformed("it ends in the middle of an entry")),
        }
    }
}

/// `PUT /files?path=` with an archive: unpacked into the folder, which is made when missing.
///
/// # Errors
/// 400 `entry_escapes` for an entry that would land outside, 400 for what is no archive; entries
/// before that one are there.
pub async fn unpack(query: &str, mut body: Incoming) -> Answer {
    let path = AbsolutePath::from_query(query, "path")?;
    let ownership = Ownership::from_query(query)?;
    ownership.make_parents(path.as_path()).map_err(|e| path.error(&e))?;
    let target = Target::open(path.as_path(), ownership.user).map_err(|e| path.error(&e))?;
    let mut unpacker = Unpacker {
        target,
        state: State::Header,
        partial: Vec::new(),
        pax: Vec::new(),
        name: None,
        link: None,
        size: 0,
    };
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| malformed(format!("the body broke off: {e}")))?;
        if let Ok(data) = frame.into_data() {
            unpacker.take(&data)?;
        }
    }
    unpacker.end()?;
    json(&crate::files::list::entry(path.as_path()).map_err(|e| path.error(&e))?)
}
