"""Restores without a pool, and what they grow with."""

import statistics
import time

from cases.claim import phases_of
from registry import bench
from report import percentile

PHASES = ("disk", "spawn", "load", "resume", "agent", "identity", "claim")


def restores(client, count, template="base", pause=0.0):
    """Sandboxes from an empty pool, one after the other, `pause` seconds apart; times and sandboxes."""
    times, sandboxes = [], []
    for _ in range(count):
        sandbox, took = client.create(template)
        if sandbox["origin"] != "restored":
            raise SystemExit(f"a sandbox came {sandbox['origin']} from a pool of 0")
        times.append(took)
        sandboxes.append(sandbox)
        client.delete(sandbox)
        time.sleep(pause)
    return times, sandboxes


@bench("restore")
def restore(run):
    """POST /v1/sandboxes with an empty pool, to identity proven and claimed, 0.3 s apart"""
    client = run.service.client()
    client.pool(0)
    hurried, others = restores(client, max(50, int(run.seconds)))
    run.report.samples("restore-back-to-back", "the same without a pause: no VMM is started ahead",
                       hurried, phases_of(others, PHASES))
    times, sandboxes = restores(client, max(50, int(run.seconds)), pause=0.3)
    guest = [s["timings_ms"]["identity_guest"] for s in sandboxes]
    run.report.samples("restore", restore.__doc__, times, phases_of(sandboxes, PHASES))
    items = {}
    for sandbox in sandboxes:
        for item in sandbox["identity"]["items"]:
            items.setdefault(item["item"], []).append(item["micros"] / 1e3)
    run.report.samples("identity", "the guest's part of it: every item, applied and read back",
                       guest, items)


@bench("growth-memory")
def growth_memory(run):
    """restores of guests of 128 MiB to 4 GiB: the time must not grow"""
    rows = []
    for mib in (128, 256, 512, 1024, 4096):
        client = run.own_service("--memory-mib", str(mib)).client()
        times, sandboxes = restores(client, 20)
        template, _ = client.call("GET", "/v1/templates/base")
        rows.append({"memory_mib": mib, "restore_p50_ms": percentile(times, 50),
                     "restore_p90_ms": percentile(times, 90),
                     "load_mean_ms": statistics.mean(s["timings_ms"]["load"] for s in sandboxes),
                     "snapshot_real_mib": template["snapshot"]["allocated_bytes"] >> 20})
    run.stop()
    run.report.rows("growth-memory", growth_memory.__doc__, rows)


@bench("growth-vms")
def growth_vms(run):
    """claims and restores beside 1 to 100 parked VMs"""
    client = run.service.client()
    rows = []
    for parked in (1, 25, 50, 100):
        client.pool(parked)
        claims = []
        for _ in range(20):
            sandbox, took = client.create()
            claims.append(took)
            client.delete(sandbox)
            client.pool(parked)
        # A pool of 0 would give the parked VMs up: another template's are not touched, but there
        # is none, so restores are those of the refill.
        refills = []
        for _ in range(5):
            sandbox, _ = client.create()
            refills.append(client.pool(parked) * 1e3)
            client.delete(sandbox)
        rows.append({"parked": parked, "claim_p50_ms": percentile(claims, 50),
                     "claim_worst_ms": max(claims), "refill_of_one_ms": percentile(refills, 50)})
    client.pool(0)
    run.report.rows("growth-vms", growth_vms.__doc__, rows)
