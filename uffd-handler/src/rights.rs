//! Whether this process may use userfaultfd for a VM's memory: for `rethaw doctor`.

use userfaultfd::{FeatureFlags, UffdBuilder};

/// What userfaultfd can do for this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Faults of the kernel on a VM's behalf can be served; without that no device works.
    pub kernel_faults: Result<(), String>,
    /// Faults of user code can be served.
    pub user_faults: Result<(), String>,
    /// `vm.unprivileged_userfaultfd`, where it can be read.
    pub unprivileged_allowed: Option<bool>,
}

/// Tries it out.
pub fn probe() -> Rights {
    let attempt = |user_mode_only: bool| {
        UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(user_mode_only)
            .require_features(FeatureFlags::EVENT_REMOVE | FeatureFlags::MISSING_SHMEM)
            .create()
            .map(drop)
            .map_err(|error| error.to_string())
    };
    let setting = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    Rights {
        kernel_faults: attempt(false),
        user_faults: attempt(true),
        unprivileged_allowed: setting.ok().map(|text| text.trim() == "1"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_may_do_everything() {
        let rights = probe();
        assert_eq!(rights.user_faults, Ok(()));
        if nix::unistd::geteuid().is_root() {
            assert_eq!(rights.kernel_faults, Ok(()));
        }
    }
}
