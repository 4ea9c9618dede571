"""Where a clone's memory comes from: what each way costs in time, faults and memory."""

import os
import re
import statistics

from registry import bench
from report import percentile

PARKED = 8
PYTHON = ["python3", "-c", "print(6 * 7)"]
WAYS = (
    ("pager, working set", ()),
    ("pager, demand only", ("--no-working-sets",)),
    ("file mapped", ("--file-backed", "base")),
)


def faults(client):
    """Demand faults the page server has answered so far."""
    client.connection.request("GET", "/metrics", headers=client.headers)
    text = client.connection.getresponse().read().decode()
    found = re.findall(r'^rethaw_uffd_faults_total\{[^}]*\} (\d+)', text, re.MULTILINE)
    return sum(int(n) for n in found)


def processes(service, name):
    """Processes the service has started, by the beginning of their command name."""
    home = os.path.realpath(service.home)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm") as file:
                same = file.read().startswith(name)
            with open(f"/proc/{pid}/cmdline") as file:
                ours = home in file.read() or home in os.readlink(f"/proc/{pid}/cwd")
            if same and ours:
                yield int(pid)
        except OSError:
            continue


def memory_mib(pid, kind):
    """A process's memory: `Pss` shares what is shared among those who do."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        found = re.search(rf"^{kind}:\s+(\d+) kB", file.read(), re.MULTILINE)
    return int(found[1]) / 1024


def parked_memory(service, client):
    """Memory of each of some parked VMs beside each other."""
    client.pool(PARKED)
    vms = list(processes(service, "rethaw-qemu")) + list(processes(service, "firecracker"))
    pss = [memory_mib(pid, "Pss") for pid in vms]
    # The spare process of the pool has loaded nothing.
    pss = sorted(pss)[-PARKED:]
    pager = sum(memory_mib(pid, "Pss") for pid in processes(service, "rethaw-pager"))
    client.pool(0)
    return statistics.mean(pss), pager


@bench("memory")
def memory(run):
    """clones by page server and by mapped file: times, faults, memory of a parked VM"""
    rows = []
    for name, flags in WAYS:
        service = run.own_service(*flags)
        client = service.client()
        # A target that an operator has set outlives the service.
        client.pool(0)
        restored, agent, python, python_warm = [], [], [], []
        fault_counts, fault_counts_python = [], []
        for _ in range(max(20, int(run.seconds / 2))):
            before = faults(client)
            sandbox, took = client.create()
            restored.append(took)
            timings = sandbox["timings_ms"]
            agent.append(timings["resume"] + timings["agent"])
            at_agent = faults(client)
            fault_counts.append(at_agent - before)
            python.append(client.execute(sandbox, PYTHON)[1])
            fault_counts_python.append(faults(client) - before)
            python_warm.append(client.execute(sandbox, PYTHON)[1])
            client.delete(sandbox)
        pss, pager = parked_memory(service, client)
        rows.append({
            "memory": name,
            "restore_p50_ms": percentile(restored, 50),
            "resume_to_agent_p50_ms": percentile(agent, 50),
            "first_python_p50_ms": percentile(python, 50),
            "second_python_p50_ms": percentile(python_warm, 50),
            "faults_to_claimed": percentile(fault_counts, 50),
            "faults_to_python": percentile(fault_counts_python, 50),
            "parked_pss_mib": pss,
            "pager_pss_mib": pager,
        })
    run.stop()
    run.report.rows("memory", f"{memory.__doc__} ({PARKED} parked)", rows)
