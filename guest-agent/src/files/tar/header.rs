//! Tar headers: 512 bytes, numbers in octal, extended by pax records.

use std::io;

/// Unit of everything in an archive.
pub const BLOCK: usize = 512;
const NAME: usize = 100;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File,
    /// Another name of an entry before.
    HardLink,
    /// Symbolic link.
    Symlink,
    /// Folder.
    Directory,
    /// Pax records for the next entry.
    Pax,
    /// Long name of the next entry, as GNU tar writes it.
    GnuName,
    /// Long link target of the next entry, as GNU tar writes it.
    GnuLink,
    /// Anything else, which is skipped.
    Other,
}

/// An entry's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Kind.
    pub kind: Kind,
    /// Path.
    pub path: Vec<u8>,
    /// Target of a link.
    pub link: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes that follow.
    pub size: u64,
    /// Last change, seconds since 1970.
    pub modified: u64,
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("tar: {what}"))
}

fn text(field: &[u8]) -> &[u8] {
    &field[..memchr::memchr(0, field).unwrap_or(field.len())]
}

/// Octal, or GNU's base 256.
fn number(field: &[u8]) -> io::Result<u64> {
    if field[0] & 0x80 != 0 {
        let bytes = field.get(field.len() - 8..).and_then(|b| b.try_into().ok());
        return bytes.map(u64::from_be_bytes).ok_or_else(|| bad("number"));
    }
    let digits = text(field).trim_ascii();
    if digits.is_empty() {
        return Ok(0);
    }
    let digits = std::str::from_utf8(digits).map_err(|_| bad("number"))?;
    u64::from_str_radix(digits, 8).map_err(|_| bad("number"))
}

fn checksum(block: &[u8; BLOCK]) -> u64 {
    let sum = |bytes: &[u8]| bytes.iter().map(|b| u64::from(*b)).sum::<u64>();
    // The field itself counts as spaces.
    sum(&block[..148]) + 8 * u64::from(b' ') + sum(&block[156..])
}

impl Header {
    /// Reads a header; `None` for the zeros that end an archive.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(block: &[u8; BLOCK]) -> io::Result<Option<Self>> {
        if block.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        if number(&block[148..156])? != checksum(block) {
            return Err(bad("header checksum"));
        }
        let kind = match block[156] {
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'5' => Kind::Directory,
            b'x' => Kind::Pax,
            b'L' => Kind::GnuName,
            b'K' => Kind::GnuLink,
            _ => Kind::Other,
        };
        let mut path = text(&block[..NAME]).to_vec();
        if &block[257..263] == b"ustar\0" && block[345] != 0 {
            path = [text(&block[345..500]), b"/", &path].concat();
        }
        Ok(Some(Self {
            kind,
            path,
            link: text(&block[157..257]).to_vec(),
            mode: (number(&block[100..108])? & 0o7777) as u32,
            uid: number(&block[108..116])? as u32,
            gid: number(&block[116..124])? as u32,
            size: number(&block[124..136])?,
            modified: number(&block[136..148])?,
        }))
    }

    /// Takes over the records of a pax header.
    ///
    /// # Errors
    /// They are malformed.
    pub fn extend(&mut self, mut records: &[u8]) -> io::Result<()> {
        while !records.is_empty() {
            let space = memchr::memchr(b' ', records).ok_or_else(|| bad("pax record"))?;
            let length = std::str::from_utf8(&records[..space]).ok().and_then(|l| l.parse().ok());
            let length: usize = length.ok_or_else(|| bad("pax record"))?;
            let record = records.get(space + 1..length.max(space + 2) - 1);
            let record = record.ok_or_else(|| bad("pax record"))?;
            let equals = memchr::memchr(b'=', record).ok_or_else(|| bad("pax record"))?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => self.path = value.to_vec(),
                b"linkpath" => self.link = value.to_vec(),
                b"size" => {
                    let size = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
                    self.size = size.ok_or_else(|| bad("pax size"))?;
                }
                _ => {}
            }
            records = records.get(length..).ok_or_else(|| bad("pax record"))?;
        }
        Ok(())
    }

    /// Writes the header, with a pax header before it where it needs one.
    pub fn write(&self, out: &mut Vec<u8>) {
        let mut records = Vec::new();
        let plain = |bytes: &[u8]| bytes.len() <= NAME && bytes.is_ascii();
        if !plain(&self.path) {
            record(&mut records, "path", &self.path);
        }
        if !plain(&self.link) {
            record(&mut records, "linkpath", &self.link);
        }
        if self.size > 0o77_777_777_777 {
            record(&mut records, "size", self.size.to_string().as_bytes());
        }
        if !records.is_empty() {
            let size = records.len() as u64;
            let path = b"pax".to_vec();
            Self { kind: Kind::Pax, path, link: Vec::new(), size, ..self.clone() }.block(out);
            out.extend(&records);
            pad(out);
        }
        self.block(out);
    }

    fn block(&self, out: &mut Vec<u8>) {
        let mut block = [0u8; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.path[..self.path.len().min(NAME)]);
        put(100, format!("{:07o}", self.mode).as_bytes());
        put(108, format!("{:07o}", self.uid.min(0o7_777_777)).as_bytes());
        put(116, format!("{:07o}", self.gid.min(0o7_777_777)).as_bytes());
        put(124, format!("{:011o}", self.size.min(0o77_777_777_777)).as_bytes());
        put(136, format!("{:011o}", self.modified.min(0o77_777_777_777)).as_bytes());
        let kind = match self.kind {
            Kind::File | Kind::Other => b'0',
            Kind::HardLink => b'1',
            Kind::Symlink => b'2',
            Kind::Directory => b'5',
            Kind::Pax => b'x',
            Kind::GnuName => b'L',
            Kind::GnuLink => b'K',
        };
        put(156, &[kind]);
        put(157, &self.link[..self.link.len().min(NAME)]);
        put(257, b"ustar\x0000");
        let sum = checksum(&block);
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        out.extend(&block);
    }
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn record(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend(format!("{length} {key}=").as_bytes());
    out.extend(value);
    out.push(b'\n');
}

/// Fills up to the next block.
pub fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(BLOCK), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(path: &str, size: u64) -> Header {
        Header {
            kind: Kind::File,
            path: path.into(),
            link: Vec::new(),
            mode: 0o640,
            uid: 1000,
            gid: 100,
            size,
            modified: 1_700_000_000,
        }
    }

    #[test]
    fn headers_survive() {
        let long = "directory/".repeat(30);
        for (path, size) in [("a", 0), ("grüße.txt", 7), (long.as_str(), 1), ("big", 1 << 40)] {
            let wanted = header(path, size);
            let mut bytes = Vec::new();
            wanted.write(&mut bytes);
            let mut blocks =
                bytes.chunks_exact(BLOCK).map(|b| <&[u8; BLOCK]>::try_from(b).unwrap());
            let mut got = Header::parse(blocks.next().unwrap()).unwrap().unwrap();
            if got.kind == Kind::Pax {
                let size = got.size as usize;
                let records = &bytes[BLOCK..BLOCK + size];
                let at = BLOCK + size.next_multiple_of(BLOCK);
                got = Header::parse(bytes[at..].try_into().unwrap()).unwrap().unwrap();
                got.extend(records).unwrap();
            }
            assert_eq!(got, wanted);
        }
    }

    #[test]
    fn rubbish_is_refused() {
        assert!(Header::parse(&[b'x'; BLOCK]).is_err());
        assert_eq!(Header::parse(&[0; BLOCK]).unwrap(), None);
        let mut plain = header("a", 0);
        for records in [&b"99 path=a\n"[..], b"path", b"0 a=b\n", b"1 ", b" ", b"12 pathpath\n"] {
            assert!(plain.extend(records).is_err(), "{records:?}");
        }
    }
}
