//! A folder under watch by inotify, with all below it where that was asked for.
//!
//! Files are uploaded under a hidden name and then renamed ([`crate::files`]). Nobody is told about
//! the hidden name, and the rename shows as what the uploader did: the file is there, and written.

use crate::files::{AbsolutePath, UPLOAD_PREFIX, entry};
use crate::server::ApiError;
use crate::wire::{WatchEvent, WatchKind, WatchRequest, codes};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::sys::statfs::statfs;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Folders in one tree.
const MAX_FOLDERS: usize = 10_000;
/// NFS, CIFS, SMB, SMB2 and FUSE: others may change what is there without this kernel's knowledge.
const NETWORK: [i64; 5] = [0x6969, 0xff53_4d42, 0x517b, 0xfe53_4d42, 0x6573_5546];

impl WatchEvent {
    /// An event without its entry.
    pub(super) fn of(name: String, kind: WatchKind) -> Self {
        Self { name, kind, entry: None }
    }
}

/// A watched folder.
#[derive(Debug)]
pub struct Tree {
    root: PathBuf,
    recursive: bool,
    entries: bool,
    inotify: Inotify,
    /// The same descriptor, for waiting.
    ready: AsyncFd<OwnedFd>,
    /// Watched folders, as paths below the root.
    folders: HashMap<WatchDescriptor, PathBuf>,
    /// The rename of an upload whose first half was seen.
    upload: Option<u32>,
}

fn on_network(path: &Path) -> io::Result<bool> {
    let kind: i64 = statfs(path)?.filesystem_type().0;
    Ok(NETWORK.contains(&kind))
}

impl Tree {
    /// Starts to watch; what happens from now on is told.
    ///
    /// # Errors
    /// 404 when the folder is not there, 409 when it is none, 422 on a network file system, 429
    /// when there are too many folders.
    pub fn new(request: &WatchRequest) -> Result<Self, ApiError> {
        let path = AbsolutePath::new(&request.path)?;
        let root = path.as_path();
        if !fs::metadata(root).map_err(|e| path.error(&e))?.is_dir() {
            return Err(path.error(&io::ErrorKind::NotADirectory.into()));
        }
        if !request.network && on_network(root).map_err(|e| path.error(&e))? {
            let text = format!("{path} is on a network file system: changes may go unseen");
            return Err(ApiError::new(422, codes::NETWORK_FILE_SYSTEM, text));
        }
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .map_err(|e| path.error(&e.into()))?;
        let ready = inotify.as_fd().try_clone_to_owned()?;
        let mut tree = Self {
            root: root.to_owned(),
            recursive: request.recursive,
            entries: request.entries,
            inotify,
            ready: crate::watch::watch(ready, Interest::READABLE)?,
            folders: HashMap::new(),
            upload: None,
        };
        tree.add(Path::new(""), &mut Vec::new()).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOSPC) => {
                let text = format!("{path}: too many folders to watch: {error}");
                ApiError::new(429, codes::TOO_MANY_WATCHES, text)
            }
            _ => path.error(&error),
        })?;
        Ok(tree)
    }

    /// The next events, at least one. Cancelling it loses nothing.
    ///
    /// # Errors
    /// The kernel's watch fails.
    pub async fn next(&mut self) -> io::Result<Vec<WatchEvent>> {
        loop {
            let mut ready = self.ready.readable().await?;
            let raw = match self.inotify.read_events() {
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    continue;
                }
                other => other?,
            };
            drop(ready);
            let mut events = Vec::new();
            for event in raw {
                self.tell(event, &mut events);
            }
            if self.entries {
                self.describe(&mut events);
            }
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }

    /// Watches a folder below the root and, where asked for, those in it. What is found there is
    /// told: it came between the folder and its watch.
    fn add(&mut self, below: &Path, found: &mut Vec<WatchEvent>) -> io::Result<()> {
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        if self.folders.len() >= MAX_FOLDERS {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let dir = self.root.join(below);
        let watch = self.inotify.add_watch(&dir, flags)?;
        self.folders.insert(watch, below.to_owned());
        if !self.recursive {
            return Ok(());
        }
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let below = below.join(entry.file_name());
            found.push(WatchEvent::of(text(&below), WatchKind::Create));
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                self.add_if_there(&below, found)?;
            }
        }
        Ok(())
    }

    /// Folders may vanish while they are looked for.
    fn add_if_there(&mut self, below: &Path, found: &mut Vec<WatchEvent>) -> io::Result<()> {
        match self.add(below, found) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(()),
            result => result,
        }
    }

    /// Stops watching a folder that was moved away, and those in it.
    fn forget(&mut self, below: &Path) {
        let gone: Vec<_> = self.folders.iter().filter(|(_, f)| f.starts_with(below)).collect();
        let gone: Vec<WatchDescriptor> = gone.into_iter().map(|(watch, _)| *watch).collect();
        for watch in gone {
            self.folders.remove(&watch);
            // The kernel may have dropped it by itself.
            let _ = self.inotify.rm_watch(watch);
        }
    }

    /// Puts one of the kernel's events into words.
    fn tell(&mut self, event: InotifyEvent, told: &mut Vec<WatchEvent>) {
        let mask = event.mask;
        if mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            told.push(WatchEvent::of(String::new(), WatchKind::Overflow));
            return;
        }
        if mask.contains(AddWatchFlags::IN_IGNORED) {
            self.folders.remove(&event.wd);
            return;
        }
        let Some(folder) = self.folders.get(&event.wd) else { return };
        let Some(name) = event.name else {
            // A folder below the root is told about by the one it is in.
            let kind = if mask.contains(AddWatchFlags::IN_DELETE_SELF) {
                WatchKind::Remove
            } else if mask.contains(AddWatchFlags::IN_MOVE_SELF) {
                WatchKind::Rename
            } else {
                WatchKind::Chmod
            };
            if folder.as_os_str().is_empty() {
                told.push(WatchEvent::of(String::new(), kind));
            }
            return;
        };
        let below = folder.join(&name);
        if name.as_encoded_bytes().starts_with(UPLOAD_PREFIX.as_bytes()) {
            if mask.contains(AddWatchFlags::IN_MOVED_FROM) {
                self.upload = Some(event.cookie);
            }
            return;
        }
        let is_folder = mask.contains(AddWatchFlags::IN_ISDIR);
        let kind = if mask.intersects(AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO) {
            WatchKind::Create
        } else if mask.contains(AddWatchFlags::IN_MODIFY) {
            WatchKind::Write
        } else if mask.contains(AddWatchFlags::IN_DELETE) {
            WatchKind::Remove
        } else if mask.contains(AddWatchFlags::IN_MOVED_FROM) {
            WatchKind::Rename
        } else {
            WatchKind::Chmod
        };
        let event_told = WatchEvent::of(text(&below), kind);
        // A file that is written in many pieces is told about once a look.
        if kind != WatchKind::Write || told.last() != Some(&event_told) {
            told.push(event_told);
        }
        if kind == WatchKind::Create && self.upload.take_if(|c| *c == event.cookie).is_some() {
            told.push(WatchEvent::of(text(&below), WatchKind::Write));
        }
        if is_folder && self.recursive && kind == WatchKind::Rename {
            self.forget(&below);
        }
        if is_folder
            && self.recursive
            && kind == WatchKind::Create
            && self.add_if_there(&below, told).is_err()
        {
            told.push(WatchEvent::of(String::new(), WatchKind::Overflow));
        }
    }

    fn describe(&self, events: &mut [WatchEvent]) {
        for event in events {
            event.entry = entry(&self.root.join(&event.name)).ok();
        }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
