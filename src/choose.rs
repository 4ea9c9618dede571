//! Which VMM this host gets: what really works, not what is installed.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use snapshotter::firecracker::Binaries;
use snapshotter::firecracker::kvm::{self, KvmReport};
use snapshotter::firecracker::{Firecracker, FirecrackerConfig};
use snapshotter::host::Accelerator;
use snapshotter::qemu::{Qemu, QemuConfig};
use snapshotter::vmm::Driver;
use uffd_handler::supervisor::Supervisor;

use crate::cli::serve::VmmChoice;
use crate::paths::Paths;

/// A VMM, and how it runs guest code.
#[derive(Debug)]
pub enum Choice {
    /// QEMU.
    Qemu(Accelerator),
    /// Firecracker.
    Firecracker(Binaries),
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Qemu(accelerator) => write!(f, "qemu with {}", accelerator.as_str()),
            Self::Firecracker(_) => f.write_str("firecracker with kvm"),
        }
    }
}

/// Whether KVM runs guests here.
pub async fn probe_kvm() -> std::io::Result<KvmReport> {
    kvm::probe(&kvm::helper_path()?, kvm::TIME_LIMIT).await
}

/// Chooses by what works, or takes what the operator wants if it can.
pub async fn choose(wanted: VmmChoice, home: &Path) -> anyhow::Result<Choice> {
    let kvm = match probe_kvm().await {
        Ok(report) => report,
        // Emulation needs no probe; whoever insists on KVM has to hear why not.
        Err(e) if wanted != VmmChoice::Firecracker => {
            tracing::warn!("KVM cannot be probed ({e}); using emulation");
            return Ok(Choice::Qemu(Accelerator::Tcg));
        }
        Err(e) => return Err(e).context("cannot probe KVM"),
    };
    let accelerator = if kvm.boots_linux() { Accelerator::Kvm } else { Accelerator::Tcg };
    match wanted {
        VmmChoice::Qemu => Ok(Choice::Qemu(accelerator)),
        VmmChoice::Auto if !kvm.boots_linux() => Ok(Choice::Qemu(accelerator)),
        VmmChoice::Auto => Ok(match Binaries::find(home) {
            Ok(binaries) => Choice::Firecracker(binaries),
            Err(e) => {
                tracing::info!("no Firecracker: {e}");
                Choice::Qemu(accelerator)
            }
        }),
        VmmChoice::Firecracker if kvm.boots_linux() => {
            Ok(Choice::Firecracker(Binaries::find(home)?))
        }
        VmmChoice::Firecracker => bail!("--vmm firecracker needs KVM, and KVM here {kvm}"),
    }
}

impl Choice {
    /// Makes the driver.
    pub async fn driver(
        self,
        paths: &Paths,
        pager: Arc<Supervisor>,
    ) -> anyhow::Result<Arc<dyn Driver>> {
        match self {
            Self::Qemu(accelerator) => {
                let config =
                    QemuConfig { binary: paths.qemu()?, shim: paths.shim.clone(), accelerator };
                Ok(Arc::new(Qemu::new(config, pager).await?))
            }
            Self::Firecracker(binaries) => {
                let config = FirecrackerConfig::new(binaries);
                Ok(Arc::new(Firecracker::new(config, pager).await?))
            }
        }
    }
}
