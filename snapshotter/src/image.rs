//! Guest images: built by the embedded `scripts/build-image`, cached by content, read from here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, BufReader};

/// The build, carried along so that an installed service needs no source tree.
const SCRIPTS: &[(&str, &str)] = &[
    ("build-image", include_str!("../../scripts/build-image")),
    ("build-kernel", include_str!("../../scripts/build-kernel")),
    ("kernel-min.config", include_str!("../../scripts/kernel-min.config")),
];
const FORMAT: u32 = 1;

/// The longest an image build may take: it installs a distribution from a package mirror.
const BUILD_DEADLINE: Duration = Duration::from_secs(20 * 60);

/// Which kernel and initramfs a guest image has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavor {
    /// The distribution's cloud kernel with a small initramfs.
    Default,
    /// A kernel tuned for the VMM's few devices, without initramfs.
    Min,
}

impl Flavor {
    fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Min => "min",
        }
    }
}

/// A guest image on disk.
#[derive(Debug, Clone)]
pub struct GuestImage {
    /// Its key: a digest of everything that went into it.
    pub key: String,
    /// Uncompressed kernel.
    pub kernel: PathBuf,
    /// Initramfs, if the kernel needs one.
    pub initrd: Option<PathBuf>,
    /// Read-only base disk.
    pub rootfs: PathBuf,
    /// Empty writable disk, to be copied.
    pub scratch: PathBuf,
    /// What the guest needs on its command line.
    pub cmdline: String,
    /// SHA-256 of each file by name.
    pub digests: BTreeMap<String, String>,
}

/// Why there is no guest image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The build could not be run.
    #[error("cannot run the image build: {0}")]
    Run(#[from] std::io::Error),
    /// The build failed; its last lines say why.
    #[error("the image build failed: {0}")]
    Build(String),
    /// The build hangs.
    #[error("the image build did not end within {BUILD_DEADLINE:?}")]
    Timeout,
    /// What is on disk is not an image.
    #[error("guest image {path:?}: {problem}")]
    Bad {
        /// Its directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

#[derive(Deserialize)]
struct ImageJson {
    format: u32,
    cmdline: String,
    digests: BTreeMap<String, String>,
}

impl GuestImage {
    /// Reads an image directory.
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        let bad = |problem: String| ImageError::Bad { path: dir.to_owned(), problem };
        let text = std::fs::read(dir.join("image.json")).map_err(|e| bad(e.to_string()))?;
        let json: ImageJson = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        if json.format != FORMAT {
            return Err(bad(format!("has format {}, this version reads {FORMAT}", json.format)));
        }
        for name in ["vmlinux", "rootfs.img", "scratch.img"] {
            if !dir.join(name).is_file() {
                return Err(bad(format!("{name} is missing")));
            }
        }
        let initrd = dir.join("initrd.img");
        Ok(Self {
            key: dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
            kernel: dir.join("vmlinux"),
            initrd: initrd.is_file().then_some(initrd),
            rootfs: dir.join("rootfs.img"),
            scratch: dir.join("scratch.img"),
            cmdline: json.cmdline,
            digests: json.digests,
        })
    }

    /// Builds the image, or finds it in the cache. `progress` gets each line the build prints.
    pub async fn ensure(
        home: &Path,
        agent: &Path,
        flavor: Flavor,
        mut progress: impl FnMut(&str) + Send,
    ) -> Result<Self, ImageError> {
        let memo = memo_path(home, agent, flavor)?;
        if let Some(image) = remembered(home, &memo) {
            progress("image: known");
            return Ok(image);
        }
        let script = unpack_scripts(home)?;
        let mut child = tokio::process::Command::new("bash")
            .arg(script)
            .args(["--flavor", flavor.as_str()])
            .arg("--agent")
            .arg(agent)
            .arg("--home")
            .arg(home)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe).into());
        };
        let run = async {
            let mut out = BufReader::new(stdout).lines();
            let mut err = BufReader::new(stderr).lines();
            let (mut dir, mut tail) = (String::new(), std::collections::VecDeque::new());
            let (mut out_open, mut err_open) = (true, true);
            while out_open || err_open {
                tokio::select! {
                    line = out.next_line(), if out_open => match line? {
                        Some(line) => dir = line,
                        None => out_open = false,
                    },
                    line = err.next_line(), if err_open => match line? {
                        Some(line) => {
                            progress(&line);
                            if tail.len() == 8 {
                                tail.pop_front();
                            }
                            tail.push_back(line);
                        }
                        None => err_open = false,
                    },
                }
            }
            let status = child.wait().await?;
            if status.success() {
                Ok(dir)
            } else {
                let tail: Vec<String> = tail.into();
                Err(ImageError::Build(format!("{status}: {}", tail.join(" | "))))
            }
        };
        let dir =
            tokio::time::timeout(BUILD_DEADLINE, run).await.map_err(|_| ImageError::Timeout)??;
        let image = Self::open(Path::new(dir.trim()))?;
        remember(&memo, &image.key)?;
        Ok(image)
    }
}

/// How long an image is used without asking the distribution for newer packages.
const MEMO_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Where it is noted which image these inputs made last time. Looking in the build's own cache asks
/// the package manager first, which takes seconds.
fn memo_path(home: &Path, agent: &Path, flavor: Flavor) -> std::io::Result<PathBuf> {
    let mut hash = Sha256::new();
    for (name, text) in SCRIPTS {
        hash.update(name);
        hash.update(text);
    }
    hash.update(flavor.as_str());
    hash.update(std::fs::read(agent)?);
    let key = hex::encode(hash.finalize());
    Ok(home.join("images").join(format!("memo-{}", &key[..32])))
}

// A key and no path: several homes may share one folder of images, each under its own name.
fn remembered(home: &Path, memo: &Path) -> Option<GuestImage> {
    let age = std::fs::metadata(memo).ok()?.modified().ok()?.elapsed().ok()?;
    if age > MEMO_AGE {
        return None;
    }
    let key = std::fs::read_to_string(memo).ok()?;
    GuestImage::open(&home.join("images").join(key.trim())).ok()
}

fn remember(memo: &Path, key: &str) -> std::io::Result<()> {
    let tmp = memo.with_extension("tmp");
    std::fs::write(&tmp, key)?;
    std::fs::rename(&tmp, memo)
}

/// Writes the build's files below `home` and returns the one to run.
fn unpack_scripts(home: &Path) -> std::io::Result<PathBuf> {
    let dir = home.join("run").join("scripts");
    std::fs::create_dir_all(&dir)?;
    for (name, text) in SCRIPTS {
        std::fs::write(dir.join(name), text)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.join(name), mode)?;
    }
    Ok(dir.join("build-image"))
}
