"""rethaw beside other ways to a fresh machine, in one run, on one image, with one command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import procfs
from plain_qemu import PlainQemu
from registry import bench
from report import ROOT, percentile

COMMAND = ["python3", "-c", "print(6 * 7)"]
ROUNDS = 10
# Of the directory of a run; its process comes next.
PREFIX = "rethaw-compare-"
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))


def machine_of(run, client):
    """How rethaw starts the template's VM, and the template's files."""
    client.pool(0)
    sandbox, _ = client.create()
    template, _ = client.call("GET", "/v1/templates/base")
    try:
        pid = next(pid for pid in procfs.vm_processes(run.home)
                   if os.readlink(f"/proc/{pid}/cwd").endswith(sandbox["id"]))
        arguments = procfs.command_line(pid)
    finally:
        client.delete(sandbox)
    snapshot = os.path.join(run.home, "snapshots", template["snapshot"]["id"])
    root = next(a for a in arguments if a.startswith("id=root,"))
    image = os.path.dirname(os.path.realpath(root.rsplit("file.filename=", 1)[1]))
    return {"arguments": ["qemu-system-x86_64", *arguments[1:]], "snapshot": snapshot,
            "image": image, "scratch": os.path.join(snapshot, "scratch.img")}


def plain_restore(machine, directory, probe):
    memory = os.path.join(machine["snapshot"], "memory.bin")
    qemu = PlainQemu(machine, directory,
                     rf"memory-backend-file,id=mem,\g<1>,share=off,mem-path={memory}",
                     ["-S", "-incoming", "defer"])
    try:
        qemu.load(os.path.join(machine["snapshot"], "vmstate.bin"))
        # The workload was frozen with the snapshot; only a new identity thaws it.
        qemu.agent(probe, "identity")
        check(qemu.agent(probe, "exec", *COMMAND))
    finally:
        qemu.end()


def cold_boot(machine, directory, probe):
    image = machine["image"]
    with open(os.path.join(image, "image.json")) as file:
        append = json.load(file)["cmdline"] + " no_timer_check tsc_early_khz=" + tsc_khz()
    start = ["-kernel", f"{image}/vmlinux", "-append", append]
    if os.path.exists(f"{image}/initrd.img"):
        start += ["-initrd", f"{image}/initrd.img"]
    fresh = {**machine, "scratch": f"{image}/scratch.img"}
    qemu = PlainQemu(fresh, directory, r"memory-backend-ram,id=mem,\g<1>", start)
    try:
        qemu.agent(probe, "boot")
        check(qemu.agent(probe, "exec", *COMMAND))
    finally:
        qemu.end()


def tsc_khz():
    with open("/proc/cpuinfo") as file:
        mhz = next(line for line in file if line.startswith("cpu MHz"))
    return str(round(float(mhz.split(":")[1]) * 1000))


def check(output):
    if "42" not in output:
        raise SystemExit(f"wrong output: {output}")


def clean_up(scratch):
    """Removes what a run keeps in its directory; first of all the mount, whose files are not its own."""
    # From the tree at once, whoever is in it still.
    subprocess.run(["umount", "-q", "-l", f"{scratch}/c/rootfs"], check=False)
    if not os.path.ismount(f"{scratch}/c/rootfs"):
        shutil.rmtree(scratch, ignore_errors=True)


def clean_up_others():
    """The same for runs that were killed; the name of each has its process in it."""
    folder = tempfile.gettempdir()
    for name in os.listdir(folder):
        pid = name.removeprefix(PREFIX).split("-")[0]
        if name.startswith(PREFIX) and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            clean_up(os.path.join(folder, name))


class Container:
    """The image's own tree under runc: namespaces, read-only root, the same command."""

    def __init__(self, machine, directory):
        self.root, self.dir = f"{directory}/rootfs", directory
        os.makedirs(self.root)
        subprocess.run(["mount", "-o", "loop,ro", f"{machine['image']}/rootfs.img", self.root],
                       check=True)
        subprocess.run(["runc", "spec"], cwd=directory, check=True)
        path = f"{directory}/config.json"
        with open(path) as file:
            config = json.load(file)
        config["process"].update(terminal=False, args=COMMAND)
        config["root"] = {"path": "rootfs", "readonly": True}
        with open(path, "w") as file:
            json.dump(config, file)

    def run(self, name):
        run = subprocess.run(["runc", "run", "--bundle", self.dir, name],
                             capture_output=True, text=True, timeout=60)
        check(run.stdout + run.stderr)


def timed(work):
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


@bench("compare")
def compare(run):
    """a command in a fresh machine: rethaw, plain QEMU restore, cold boot, container"""
    client = run.service.client()
    machine = machine_of(run, client)
    subprocess.run(["cargo", "build", "--release", "--locked", "-q", "-p", "rethaw-agent",
                    "--features", "client", "--example", "agent_probe"], cwd=ROOT, check=True)
    probe = os.path.join(TARGET, "release", "examples", "agent_probe")
    clean_up_others()
    scratch = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")
    # A signal becomes an exception, so that what is cleaned up after one is after the other.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        measure(run, client, machine, probe, scratch)
    finally:
        clean_up(scratch)
        signal.signal(signal.SIGTERM, before)
        client.pool(0)


def measure(run, client, machine, probe, scratch):
    container = Container(machine, f"{scratch}/c") if shutil.which("runc") else None
    if container is None:
        print("compare: no runc on this host: the container is left out")

    def sandboxed(target):
        client.pool(target)
        sandboxes = []

        def work():
            sandbox, _ = client.create()
            sandboxes.append(sandbox)
            check(client.execute(sandbox, COMMAND)[0]["stdout"])

        took = timed(work)
        client.delete(sandboxes[0])
        return took

    ways = {
        "rethaw-claim": ("VM, identity of its own", lambda _: sandboxed(1)),
        "rethaw-restore": ("VM, identity of its own", lambda _: sandboxed(0)),
        "plain-qemu-restore": ("VM, an identity asked for by a script",
                               lambda n: timed(lambda: plain_restore(machine, f"{scratch}/r{n}", probe))),
        "cold-boot": ("VM, identity of a first boot",
                      lambda n: timed(lambda: cold_boot(machine, f"{scratch}/b{n}", probe)))}
    if container:
        ways["runc"] = ("processes under the host's kernel: no hardware boundary, no systemd",
                        lambda n: timed(lambda: container.run(f"rethaw-bench-{os.getpid()}-{n}")))
    times = {name: [] for name in ways}
    # Turn and turn about: the machine's mood is the same for all.
    for n in range(ROUNDS):
        for name, (_, way) in ways.items():
            times[name].append(way(n))
    base = percentile(times["rethaw-claim"], 50)
    for name, (isolation, _) in ways.items():
        run.report.samples(f"compare-{name}", isolation, times[name], None,
                           {"times_a_claim": percentile(times[name], 50) / base})
