"""Claims from the pool, with refill running: one at a time, under load, in bursts."""

import os
import threading
import time

from registry import bench
from report import percentile

CLAIM_PHASES = ("resume", "claim", "claim_guest")


class Reaper:
    """Deletes sandboxes on a connection of its own, outside every measured time."""

    def __init__(self, client):
        self._client, self._doomed = client, []
        self._wake = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def take(self, sandbox):
        with self._wake:
            self._doomed.append(sandbox)
            self._wake.notify()

    def _run(self):
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._doomed or self._ended)
                if not self._doomed:
                    return
                sandbox = self._doomed.pop(0)
            self._client.delete(sandbox)

    def end(self):
        with self._wake:
            self._ended = True
            self._wake.notify()
        self._thread.join()


def go_first():
    """Takes the calling thread out of the contest with VMs for the CPU, where that is allowed: a client
    on a machine of its own is in none, and what it measures is the service."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        pass


def open_loop(service, rate, count, first_exec_every=0, hurries=lambda number: True):
    """Claims that are due at a fixed rate, whatever the earlier ones did: a late one is timed from
    when it was due, so that a slow claim cannot hide the wait of those behind it. A claim waits for
    its own connection, never for another claim's. Clients that hurry go before the VMs."""
    clients = [service.client() for _ in range(16)]
    reaper = Reaper(service.client())
    results, lock = [], threading.Lock()
    started = time.monotonic() + 0.1

    def worker(number):
        if hurries(number):
            go_first()
        for i in range(number, count, len(clients)):
            due = started + i / rate
            time.sleep(max(0, due - time.monotonic()))
            late = max(0.0, (time.monotonic() - due) * 1e3)
            sandbox, took = clients[number].create()
            execution = None
            if first_exec_every and i % first_exec_every == 0:
                execution = clients[number].execute(sandbox, ["/bin/true"])[1]
            with lock:
                results.append((took + late, sandbox, execution, hurries(number)))
            reaper.take(sandbox)

    threads = [threading.Thread(target=worker, args=(n,)) for n in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reaper.end()
    if len(results) != count:
        raise SystemExit(f"{count - len(results)} of {count} claims failed")
    return results


def phases_of(sandboxes, names):
    found = {}
    for sandbox in sandboxes:
        for name in names:
            if name in sandbox["timings_ms"]:
                found.setdefault(name, []).append(sandbox["timings_ms"][name])
    return found


def origins_of(sandboxes):
    counts = {}
    for sandbox in sandboxes:
        counts[sandbox["origin"]] = counts.get(sandbox["origin"], 0) + 1
    return counts


@bench("claim")
def claim(run):
    """warm claims, open loop at 5 a second for a minute, again until 1000, refill running"""
    client = run.service.client()
    results = []
    while len(results) < 1000:
        # Deep enough for a minute of claims that come faster than a small host refills.
        client.pool(128)
        results += open_loop(run.service, 5.0, 300, 5)
    client.pool(0)
    sandboxes = [s for _, s, _, _ in results]
    run.report.samples(
        "claim", "POST /v1/sandboxes at 5/s for a minute, pool of 128, refill running",
        [t for t, _, _, _ in results], phases_of(sandboxes, CLAIM_PHASES),
        {"origins": origins_of(sandboxes)})
    run.report.samples("claim-first-exec", "the first /bin/true after a warm claim",
                       [e for _, _, e, _ in results if e is not None])
    run.report.samples("claim-to-first-exec", "POST /v1/sandboxes to the first command's output",
                       [t + e for t, _, e, _ in results if e is not None])


@bench("claim-refilling")
def claim_refilling(run):
    """warm claims at 3 a second while refill never rests; every other client goes before VMs"""
    client = run.service.client()
    client.pool(16)
    # Never reached while this runs: the refill is at work all the time.
    count = max(100, int(run.seconds * 3))
    client.pool(16 + count, wait=False)
    results = open_loop(run.service, 3.0, count, hurries=lambda number: number % 2 == 0)
    after, _ = client.call("GET", "/v1/pools/base")
    what = "POST /v1/sandboxes at 3/s, refill at full speed on the same cores"
    for name, hurried, who in (
            ("claim-refilling", True, "by clients that go before VMs"),
            ("claim-refilling-beside", False, "by clients scheduled as the VMs are")):
        mine = [(t, s) for t, s, _, h in results if h == hurried]
        sandboxes = [s for _, s in mine]
        run.report.samples(
            name, f"{what}, {who}", [t for t, _ in mine], phases_of(sandboxes, CLAIM_PHASES),
            {"origins": origins_of(sandboxes), "parked_after": after["ready"],
             "restored_meanwhile": after["ready"] + count - 16})
    client.pool(0)


def burst(service, size):
    """As many claims at once, each on its own connection; latencies, wall time, sandboxes."""
    clients = [service.client() for _ in range(size)]
    for client in clients:
        client.call("GET", "/healthz")
    barrier = threading.Barrier(size + 1)
    results, lock = [], threading.Lock()

    def one(client):
        barrier.wait()
        sandbox, took = client.create()
        with lock:
            results.append((took, sandbox))

    threads = [threading.Thread(target=one, args=(c,)) for c in clients]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    wall = (time.perf_counter() - started) * 1e3
    if len(results) != size:
        raise SystemExit(f"{size - len(results)} of {size} claims of a burst failed")
    return [t for t, _ in results], wall, [s for _, s in results]


@bench("burst")
def bursts(run):
    """16 and 50 claims at once from a full pool, beside one after the other"""
    client = run.service.client()
    refill = client.pool(16)
    run.report.facts("refill", "an empty pool to 16 parked VMs", {
        "seconds": round(refill, 3), "vms_per_second": round(16 / refill, 2)})
    singles = []
    for _ in range(16):
        sandbox, took = client.create()
        singles.append(took)
        client.delete(sandbox)
    for size in (16, 50):
        latencies, walls, origins = [], [], {}
        for _ in range(3):
            client.pool(size)
            times, wall, sandboxes = burst(run.service, size)
            latencies += times
            walls.append(wall)
            for origin, n in origins_of(sandboxes).items():
                origins[origin] = origins.get(origin, 0) + n
            for sandbox in sandboxes:
                client.delete(sandbox)
        run.report.samples(f"burst-{size}", f"{size} claims at once, three times", latencies, None, {
            "wall_ms": [round(w, 1) for w in walls], "origins": origins,
            "one_by_one_sum_ms": round(percentile(singles, 50) * size, 1)})
    client.pool(0)


@bench("exhausted")
def exhausted(run):
    """12 claims at once on a pool of 4: what a miss costs, and how fast the pool recovers"""
    client = run.service.client()
    client.pool(4)
    times, wall, sandboxes = burst(run.service, 12)
    recovery = client.pool(4)
    warm = [t for t, s in zip(times, sandboxes) if s["origin"] == "warm"]
    cold = [t for t, s in zip(times, sandboxes) if s["origin"] != "warm"]
    run.report.samples("exhausted", "12 claims at once on a pool of 4", times, None, {
        "wall_ms": round(wall, 1), "warm": len(warm), "warm_worst_ms": round(max(warm), 2),
        "restored": len(cold), "restored_worst_ms": round(max(cold, default=0), 2),
        "pool_full_again_s": round(recovery, 2)})
    for sandbox in sandboxes:
        client.delete(sandbox)
    client.pool(0)
