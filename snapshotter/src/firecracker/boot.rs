//! Cold boot: devices one by one, then the start.

use super::api::{ApiError, NetworkInterface, VsockDevice};
use super::api::{BootSource, CacheType, Drive, EntropyDevice, IoEngine, MachineConfig};
use super::home::{self, Access};
use super::spawn::{Console, SpawnSpec, Spawned, api_error, died};
use super::vm::{FirecrackerVm, Origin};
use super::{COMMAND_DEADLINE, Firecracker, NIC, SCRATCH};
use crate::vmm::{BootSpec, MemoryBackend, VmmError};

/// What a kernel under Firecracker needs to know.
///
/// The clock must be the TSC: a restored guest then goes on exactly where it stopped, while with
/// kvm-clock on Firecracker 1.12 its monotonic time jumps by as long as the snapshot lay on disk.
const KERNEL_ARGS: &str = "clocksource=tsc tsc=reliable reboot=k panic=1 pci=off i8042.noaux \
                           i8042.nomux i8042.dumbkbd";

/// The same in every guest: the host tells guests apart by their sockets.
const GUEST_CID: u32 = 3;
/// What the guest sees until its agent gives it another.
const GUEST_MAC: &str = "02:00:00:00:00:01";

/// Boots `spec`.
pub(super) async fn boot(driver: &Firecracker, spec: &BootSpec) -> Result<FirecrackerVm, VmmError> {
    let spawn = SpawnSpec {
        id: &spec.id,
        run_dir: &spec.run_dir,
        root_disk: &spec.root_disk,
        scratch_disk: &spec.scratch_disk,
        size: spec.size,
        nic: &spec.nic,
        console: Console::File,
    };
    let spawned = driver
        .spawn(&spawn, |home| {
            home.put(&spec.kernel, home::KERNEL, Access::ReadOnly)?;
            spec.initrd.as_ref().map_or(Ok(()), |i| home.put(i, home::INITRD, Access::ReadOnly))
        })
        .await?;
    let configured = tokio::select! {
        biased;
        done = configure(driver, spec, &spawned) => done,
        reason = spawned.process.exited() => {
            return Err(died(&spec.id, &spec.run_dir, &spawned.home, reason));
        }
    };
    configured.map_err(|e| api_error(&spec.id, "booting", e))?;
    // Read by now; what the guest does later needs neither.
    spawned.home.forget(home::KERNEL);
    spawned.home.forget(home::INITRD);
    let origin = Origin::Booted;
    let common = (spec.id.as_str(), spec.run_dir.as_path(), spec.size, MemoryBackend::File);
    Ok(FirecrackerVm::new(driver, common, spawned, origin, None))
}

async fn configure(
    driver: &Firecracker,
    spec: &BootSpec,
    spawned: &Spawned,
) -> Result<(), ApiError> {
    let (api, deadline) = (&spawned.api, COMMAND_DEADLINE);
    let limits = driver.config.limits;
    let machine = MachineConfig {
        vcpu_count: spec.size.vcpus,
        mem_size_mib: spec.size.memory_bytes >> 20,
        // Snapshots of a booted VM are full ones.
        track_dirty_pages: false,
        huge_pages: driver.config.huge_pages,
    };
    api.put_machine(&machine, deadline).await?;
    if let Some(template) = &driver.config.cpu_template {
        api.put_cpu(template, deadline).await?;
    }
    let source = BootSource {
        kernel_image_path: home::KERNEL.to_owned(),
        initrd_path: spec.initrd.as_ref().map(|_| home::INITRD.to_owned()),
        boot_args: format!("{} {KERNEL_ARGS}", spec.cmdline),
    };
    api.put_boot_source(&source, deadline).await?;
    let drive = |id: &str, path: &str, is_read_only| Drive {
        drive_id: id.to_owned(),
        path_on_host: path.to_owned(),
        // Where the root is, is said on the command line, as for every VMM.
        is_root_device: false,
        is_read_only,
        // A sandbox's disk need not survive the host's power cut.
        cache_type: CacheType::Unsafe,
        io_engine: IoEngine::Sync,
        rate_limiter: None,
    };
    api.put_drive(&drive("root", home::ROOT_DISK, true), deadline).await?;
    let mut scratch = drive(SCRATCH, home::SCRATCH_DISK, false);
    scratch.rate_limiter = limits.disk;
    api.put_drive(&scratch, deadline).await?;
    let nic = NetworkInterface {
        iface_id: NIC.to_owned(),
        host_dev_name: spawned.tap.clone(),
        guest_mac: Some(GUEST_MAC.to_owned()),
        rx_rate_limiter: limits.network_rx,
        tx_rate_limiter: limits.network_tx,
    };
    api.put_nic(&nic, deadline).await?;
    let vsock = VsockDevice { guest_cid: GUEST_CID, uds_path: home::VSOCK.to_owned() };
    api.put_vsock(&vsock, deadline).await?;
    api.put_entropy(&EntropyDevice::default(), deadline).await?;
    api.start(deadline).await
}
