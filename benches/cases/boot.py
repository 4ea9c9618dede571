"""Cold boots: what everything else is there to avoid."""

import os
import shutil
import tempfile

from registry import bench
from service import Service


def fresh_home(home):
    """A home that has the guest images but no snapshot: its first start boots a golden VM."""
    path = tempfile.mkdtemp(prefix="b", dir=home)
    for shared in ("images", "kernels"):
        os.makedirs(os.path.join(home, shared), exist_ok=True)
        os.symlink(os.path.join(home, shared), os.path.join(path, shared))
    return path


def boots(run, flavor, count):
    """Figures of as many golden boots, each from its template's manifest."""
    figures = []
    for _ in range(count):
        home = fresh_home(run.home)
        try:
            service = Service(run.binary, home, 0, ("--flavor", flavor))
            try:
                template, _ = service.client().call("GET", "/v1/templates/base")
                figures.append(template["snapshot"]["boot_ms"])
            finally:
                service.stop()
        finally:
            shutil.rmtree(home)
    return figures


def report(run, flavor):
    figures = boots(run, flavor, 5)

    def column(key):
        return [f[key] for f in figures]

    run.report.samples(
        f"boot-{flavor}", f"VMM start to systemd running, {flavor} kernel; kernel and userspace are "
        "systemd's own figures", column("total_ms"),
        {"kernel": column("kernel_ms"), "userspace": column("userspace_ms")})
    run.report.samples(f"snapshot-{flavor}", "settled and paused VM to a snapshot on disk",
                       column("snapshot_ms"))


@bench("boot-default")
def boot_default(run):
    """cold boots of the golden VM with the distribution's cloud kernel"""
    report(run, "default")


@bench("boot-min")
def boot_min(run):
    """cold boots with the small kernel; skipped where it was not built (scripts/build-kernel)"""
    kernels = os.path.join(run.home, "kernels")
    # Only one built here has its configuration beside it.
    if not os.path.isdir(kernels) or not any(
            os.path.exists(os.path.join(kernels, k, "config")) for k in os.listdir(kernels)):
        print("boot-min: skipped: no small kernel there; scripts/build-kernel makes it (minutes)")
        return
    report(run, "min")
