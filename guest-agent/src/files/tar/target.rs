//! Where an archive is unpacked: a folder that no entry can get out of, whatever its name says and
//! whatever links earlier entries have made. The kernel checks that (`RESOLVE_BENEATH`), not us.

use crate::users::User;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{
    Gid, LinkatFlags, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat,
};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

/// The folder.
#[derive(Debug)]
pub struct Target {
    root: OwnedFd,
    user: Option<User>,
}

/// A file that is being unpacked, under a temporary name.
#[derive(Debug)]
pub struct Unfinished {
    /// Its contents go here.
    pub file: File,
    parent: OwnedFd,
    temporary: String,
    name: PathBuf,
    kept: bool,
}

/// An entry's path inside the folder; `None` when it would be outside.
pub fn inside(path: &[u8]) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt as _;
    let mut clean = PathBuf::new();
    for part in Path::new(std::ffi::OsStr::from_bytes(path)).components() {
        match part {
            Component::Normal(part) => clean.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(clean)
}

fn directory() -> OFlag {
    OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC
}

impl Target {
    /// Opens the folder, which is there.
    ///
    /// # Errors
    /// It is not, or is no folder.
    pub fn open(root: &Path, user: Option<User>) -> io::Result<Self> {
        Ok(Self { root: open(root, directory(), Mode::empty())?, user })
    }

    fn beneath(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_BENEATH);
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        openat2(&self.root, path, how)
    }

    /// Opens a folder inside, making it and its parents where they are missing.
    ///
    /// # Errors
    /// EXDEV when a link on the way leads outside.
    pub fn folder(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.beneath(path, directory()) {
            Err(Errno::ENOENT) => {}
            result => return Ok(result?),
        }
        let parent = self.folder(path.parent().unwrap_or(Path::new("")))?;
        let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
        match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let folder = openat(&parent, name, directory() | OFlag::O_NOFOLLOW, Mode::empty())?;
        self.give(&folder)?;
        Ok(folder)
    }

    fn give(&self, file: &OwnedFd) -> io::Result<()> {
        let Some(user) = &self.user else { return Ok(()) };
        Ok(fchown(file, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))?)
    }

    /// The folder entry itself, with its permissions.
    ///
    /// # Errors
    /// As [`Target::folder`].
    pub fn make_folder(&self, path: &Path, mode: u32) -> io::Result<()> {
        let folder = self.folder(path)?;
        Ok(fchmod(&folder, Mode::from_bits_truncate(mode))?)
    }

    fn parent_and_name(&self, path: &Path) -> io::Result<(OwnedFd, PathBuf)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
        Ok((self.folder(path.parent().unwrap_or(Path::new("")))?, PathBuf::from(name)))
    }

    /// A new file.
    ///
    /// # Errors
    /// As [`Target::folder`].
    pub fn file(&self, path: &Path, mode: u32) -> io::Result<Unfinished> {
        let (parent, name) = self.parent_and_name(path)?;
        let mut random = [0u8; 8];
        crate::random::fill(&mut random)?;
        let temporary = format!(".rethaw-upload-{}", hex::encode(random));
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let file = openat(&parent, temporary.as_str(), flags, Mode::from_bits_truncate(0o600))?;
        let file = Unfinished { file: file.into(), parent, temporary, name, kept: false };
        if let Some(user) = &self.user {
            fchown(&file.file, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))?;
        }
        fchmod(&file.file, Mode::from_bits_truncate(mode))?;
        Ok(file)
    }

    /// A symbolic link, in place of what is there.
    ///
    /// # Errors
    /// As [`Target::folder`]; a folder is not replaced.
    pub fn symlink(&self, path: &Path, target: &Path) -> io::Result<()> {
        let (parent, name) = self.parent_and_name(path)?;
        remove(&parent, &name)?;
        symlinkat(target, &parent, &name)?;
        if let Some(user) = &self.user {
            let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
            fchownat(&parent, &name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    /// Another name for a file that is inside already.
    ///
    /// # Errors
    /// As [`Target::folder`]; the file is not there.
    pub fn hard_link(&self, path: &Path, existing: &Path) -> io::Result<()> {
        let (parent, name) = self.parent_and_name(path)?;
        let (from, old) = self.parent_and_name(existing)?;
        remove(&parent, &name)?;
        Ok(linkat(&from, &old, &parent, &name, LinkatFlags::empty())?)
    }
}

fn remove(parent: &OwnedFd, name: &Path) -> io::Result<()> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl Unfinished {
    /// Gives the file its name.
    ///
    /// # Errors
    /// The name is a folder's.
    pub fn keep(mut self) -> io::Result<()> {
        nix::fcntl::renameat(&self.parent, self.temporary.as_str(), &self.parent, &self.name)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing more can be done about a file that does not go away.
            let _ = unlinkat(&self.parent, self.temporary.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::inside;
    use std::path::Path;

    #[test]
    fn names_that_lead_outside() {
        assert_eq!(inside(b"./a//b/./c/"), Some(Path::new("a/b/c").to_owned()));
        assert_eq!(inside(b"./"), Some(Path::new("").to_owned()));
        for bad in [&b"/etc/passwd"[..], b"..", b"a/../../b", b"../x"] {
            assert_eq!(inside(bad), None);
        }
    }
}
