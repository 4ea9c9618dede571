"""Pause, resume and fork of a running sandbox."""

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
