"""Pause, resume and fork of a running sandbox."""

import json
import os
import statistics

from cases.claim import phases_of
from registry import bench

PAUSE = ("freeze", "vmstate", "memory", "disk", "stack", "publish")
RESUME = ("disk", "spawn", "load", "resume", "agent", "revive")


@bench("pause-resume")
def pause_resume(run):
    """pause and resume of a workspace that changed 32 MiB since the last one"""
    client = run.service.client()
    client.pool(1)
    sandbox, _ = client.create()
    pauses, resumes, paused, resumed = [], [], [], []
    for _ in range(max(10, int(run.seconds / 3))):
        client.execute(sandbox, ["sh", "-c", "head -c 33554432 /dev/urandom > /dev/shm/changed"])
        reply, took = client.act(sandbox, "pause")
        pauses.append(took)
        paused.append(reply)
        reply, took = client.act(sandbox, "resume")
        resumes.append(took)
        resumed.append(reply)
    client.delete(sandbox)
    run.report.samples("pause", "32 MiB changed, to disk", pauses, phases_of(paused, PAUSE))
    run.report.samples("resume", "the same, back to the agent", resumes, phases_of(resumed, RESUME))


def cycles(client, count, changed=33554432):
    """Pauses and resumes a workspace that changes so many bytes each time; gives the replies."""
    sandbox, _ = client.create()
    script = f"head -c {changed} /dev/urandom > /dev/shm/changed"
    times = {"pause": [], "resume": []}
    replies = {"pause": [], "resume": []}
    for _ in range(count):
        client.execute(sandbox, ["sh", "-c", script])
        for action in times:
            reply, took = client.act(sandbox, action)
            times[action].append(took)
            replies[action].append(reply)
    client.delete(sandbox)
    return times, replies


def layer_bytes(home, changed):
    """Sizes of the newest layers below `home`, over what the guest changed."""
    found = []
    for folder in os.scandir(os.path.join(home, "snapshots")):
        with open(os.path.join(folder.path, "manifest.json")) as file:
            manifest = json.load(file)
        if manifest["parent"]:
            found.append(sum(manifest["files"][name]["allocated_bytes"]
                             for name in manifest["files"] if "memory.delta" in name))
    return [round(size / changed, 3) for size in found]


@bench("workspace-encryption")
def workspace_encryption(run):
    """a 256 MiB workspace that changed 32 MiB: pause, resume, layer size; encrypted and not"""
    count = max(10, int(run.seconds / 3))
    for name, flags in (("encrypted", []), ("in-the-clear", ["--no-encryption"])):
        client = run.own_service("--memory-mib", "256", *flags).client()
        client.pool(0)
        times, replies = cycles(client, count)
        sandbox, _ = client.create()
        client.execute(sandbox, ["sh", "-c", "head -c 33554432 /dev/urandom > /dev/shm/changed"])
        client.act(sandbox, "pause")
        extra = {"layer_over_changed": layer_bytes(run.home, 33554432)}
        client.delete(sandbox)
        run.report.samples(f"pause-256-{name}", "32 MiB changed, to disk", times["pause"],
                           phases_of(replies["pause"], PAUSE), extra)
        run.report.samples(f"resume-256-{name}", "the same, back to the agent", times["resume"],
                           phases_of(replies["resume"], RESUME))
    run.stop()


@bench("pause-growth")
def pause_growth(run):
    """how the time of a pause grows with what was changed"""
    client = run.service.client()
    client.pool(0)
    rows = []
    for mebibytes in (0, 1, 4, 16, 64):
        times, _ = cycles(client, 5, mebibytes << 20)
        rows.append({"changed_mib": mebibytes, "pause_p50_ms": statistics.median(times["pause"]),
                     "resume_p50_ms": statistics.median(times["resume"])})
    run.report.rows("pause-growth", "five pauses each", rows)


@bench("fork")
def fork(run):
    """four clones of a running sandbox that changed 8 MiB"""
    client = run.service.client()
    client.pool(1)
    sandbox, _ = client.create()
    client.execute(sandbox, ["sh", "-c", "head -c 8388608 /dev/urandom > /dev/shm/changed"])
    times, clones = [], []
    for _ in range(max(5, int(run.seconds / 12))):
        reply, took = client.act(sandbox, "fork", {"count": 4})
        times.append(took)
        for item in reply["items"]:
            if "id" not in item:
                raise SystemExit(f"a clone failed: {item}")
            clones.append(item)
            client.delete(item)
    client.delete(sandbox)
    run.report.samples("fork", "4 clones, each a machine of its own", times, phases_of(
        clones, ("spawn", "load", "resume", "agent", "identity", "claim")))
