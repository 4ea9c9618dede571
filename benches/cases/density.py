"""What parked VMs cost the host."""

import time

import procfs
from registry import bench

PARKED = 50
WATCHED_SECONDS = 20
# Parked VMs at most.
MOST = 1000


def summed(pids):
    memory = [procfs.memory_kib(pid) for pid in pids]
    return {"pss_mib": sum(m["pss"] for m in memory) / 1024,
            "private_mib": sum(m["private"] for m in memory) / 1024,
            "descriptors": sum(procfs.descriptors(pid) for pid in pids)}


def service_processes(service):
    """The service and its page server."""
    return [service.process.pid, *procfs.children(service.process.pid)]


# What memory comes from, and the service's options for it.
BACKENDS = {"": ("page server", ()), "-mapped": ("mapped file", ("--file-backed", "base"))}


@bench("density")
def density(run):
    """memory, descriptors and CPU of 50 parked VMs, by page server and by mapped file"""
    for suffix, (backend, flags) in BACKENDS.items():
        parked_vms(run, f"density{suffix}", backend, run.own_service(*flags))
    run.stop()


def parked_vms(run, name, backend, service):
    client = service.client()
    client.pool(0)
    time.sleep(2)
    own = [pid for pid in service_processes(service) if pid not in procfs.vm_processes(run.home)]
    empty = summed(own)
    client.pool(PARKED)
    time.sleep(2)
    vms = procfs.vm_processes(run.home)
    full, parked = summed(own), summed(vms)
    before = {pid: procfs.cpu_seconds(pid) for pid in vms + own}
    time.sleep(WATCHED_SECONDS)
    spent = {pid: procfs.cpu_seconds(pid) - before[pid] for pid in before}
    vm_cpu = sum(spent[pid] for pid in vms)
    own_cpu = sum(spent[pid] for pid in own)
    client.pool(0)
    run.report.facts(name, f"{backend}: {PARKED} parked VMs and the pool's spare process, watched for "
                     f"{WATCHED_SECONDS} s", {
        "processes": len(vms),
        "pss_per_vm_mib": parked["pss_mib"] / len(vms),
        "private_per_vm_mib": parked["private_mib"] / len(vms),
        "descriptors_per_vm": parked["descriptors"] / len(vms),
        "service_pss_mib": full["pss_mib"],
        "service_pss_per_vm_mib": (full["pss_mib"] - empty["pss_mib"]) / PARKED,
        "service_descriptors_per_vm": (full["descriptors"] - empty["descriptors"]) / PARKED,
        "vm_cpu_percent_of_a_core": 100 * vm_cpu / WATCHED_SECONDS,
        "service_cpu_percent_of_a_core": 100 * own_cpu / WATCHED_SECONDS})


@bench("capacity")
def capacity(run):
    """how many parked VMs fit in 16 GiB, by parking them, by page server and by mapped file"""
    for suffix, (backend, flags) in BACKENDS.items():
        service = run.own_service(*flags)
        fill(run, f"capacity{suffix}", backend, service)
    run.stop()


def fill(run, name, backend, service):
    limit_mib = 16 << 10
    client = service.client()
    parked, used, rows = 0, 0.0, []
    while used < limit_mib and parked < MOST:
        parked += 50
        client.pool(parked)
        pids = set(procfs.vm_processes(run.home)) | set(service_processes(service))
        used = summed(list(pids))["pss_mib"]
        rows.append({"parked": parked, "pss_mib": used, "per_vm_mib": used / parked,
                     "available_mib": available_mib()})
        if rows[-1]["available_mib"] < 2048:
            break
    fits = int(parked * min(1.0, limit_mib / used))
    client.pool(0)
    run.report.rows(name, f"{backend}: about {fits} parked VMs in 16 GiB of proportional memory", rows)


def available_mib():
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) >> 10
    raise SystemExit("no MemAvailable in /proc/meminfo")
