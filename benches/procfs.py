"""What processes cost, as /proc shows it."""

import os

TICKS = os.sysconf("SC_CLK_TCK")


def vm_processes(home):
    """Ids of the VMM processes of a home: each works in its VM's directory."""
    run = os.path.join(home, "run", "vm") + "/"
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if (os.readlink(f"/proc/{pid}/cwd") + "/").startswith(run):
                found.append(int(pid))
        except OSError:
            continue
    return found


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def memory_kib(pid):
    """Proportional and private memory of a process."""
    sums = {}
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if rest.strip().endswith("kB"):
                sums[name] = int(rest.split()[0])
    private = sums["Private_Clean"] + sums["Private_Dirty"]
    return {"pss": sums["Pss"], "private": private}


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def command_line(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return [a.decode() for a in file.read().split(b"\0")[:-1]]
