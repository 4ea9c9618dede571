//! What this host can do: the facts a driver's choice and a snapshot's validity depend on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How guest code is executed under QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's own translator: slow, and works anywhere.
    Tcg,
}

impl Accelerator {
    /// Its name in manifests and in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// `(model name, flags)` of the first CPU.
pub fn cpu() -> (String, String) {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        text.lines()
            .find(|l| l.starts_with(name))
            .and_then(|l| l.split_once(':'))
            .map(|(_, v)| v.trim().to_owned())
            .unwrap_or_default()
    };
    (field("model name"), field("flags"))
}

/// Kernel release of this host.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// This host's TSC frequency in kHz, as far as user space can know it: a TCG guest cannot always
/// calibrate its TSC against the emulated timers and has to be told.
pub fn tsc_khz() -> u64 {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = text
        .lines()
        .find(|l| l.starts_with("cpu MHz"))
        .and_then(|l| l.split_once(':'))
        .and_then(|(_, v)| v.trim().parse::<f64>().ok())
        .unwrap_or(2000.0);
    (mhz * 1000.0) as u64
}

/// The facts common to all drivers. Under an emulator the guest's CPU is the emulator's, so the
/// host's CPU and kernel do not bind a snapshot.
pub fn facts(accelerator: Accelerator) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    facts.insert("accelerator".to_owned(), accelerator.as_str().to_owned());
    if accelerator == Accelerator::Kvm {
        let (model, flags) = cpu();
        facts.insert("cpu_model".to_owned(), model);
        facts.insert("cpu_flags".to_owned(), flags);
        facts.insert("host_kernel".to_owned(), kernel_release());
    }
    facts
}
