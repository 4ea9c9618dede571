"""Benchmarks of a real service on real VMs.

usage: bench.py [--list] [--filter TEXT] [--seconds N] [--out DIR] [--binary PATH]

Each benchmark prints n, p50, p90, p99 and the share of each phase, and writes its raw samples with a
stamp of the machine to DIR/NAME.json. Latencies are taken outside the service, over one kept
HTTP connection, from sending the request to having read the reply.
"""

import argparse
import http.client
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))


class Service:
    """A service on a home of its own port; artefacts come from $RETHAW_HOME."""

    def __init__(self, binary, home, pool):
        self.home = home
        self.log = tempfile.NamedTemporaryFile("w+", prefix="rethaw-bench-", suffix=".log")
        self.process = subprocess.Popen(
            [binary, "serve", "--listen", "127.0.0.1:0", "--home", home, "--pool-target", str(pool)],
            stderr=self.log, stdout=self.log, env={**os.environ, "NO_COLOR": "1"})
        self.address = self.wait_for_address()
        self.connection = None
        self.wait_ready()

    def wait_for_address(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with open(self.log.name) as log:
                for line in log:
                    if "listening on http://" in line:
                        return line.split("listening on http://")[1].strip()
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise SystemExit("service did not start:\n" + open(self.log.name).read())

    def wait_ready(self):
        deadline = time.monotonic() + 1500
        while time.monotonic() < deadline:
            connection = http.client.HTTPConnection(self.address, timeout=10)
            connection.request("GET", "/readyz")
            reply = connection.getresponse()
            text = reply.read()
            if reply.status == 200:
                with open(os.path.join(self.home, "api-key")) as file:
                    self.key = file.read().strip()
                return
            if b'"failed"' in text:
                break
            time.sleep(0.1)
        raise SystemExit("service is not ready:\n" + open(self.log.name).read())

    def client(self):
        return Client(self.address, self.key)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise SystemExit("the service did not stop within 30 s")


class Client:
    """One kept connection."""

    def __init__(self, address, key):
        self.connection = http.client.HTTPConnection(address, timeout=60)
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body)
        started = time.perf_counter()
        self.connection.request(method, path, data, self.headers)
        reply = self.connection.getresponse()
        text = reply.read()
        took = (time.perf_counter() - started) * 1e3
        if reply.status >= 400:
            raise SystemExit(f"{method} {path}: {reply.status} {text.decode()}")
        return (json.loads(text) if text else None), took

    def execute(self, sandbox, argv):
        path = f"/v1/sandboxes/{sandbox['id']}/exec?buffered=true"
        reply, took = self.call("POST", path, {"argv": argv})
        if reply["exit_code"] != 0:
            raise SystemExit(f"{argv}: {reply}")
        return reply, took

    def pool(self, target, wait=True):
        self.call("PUT", "/v1/pools/base", {"target": target})
        deadline = time.monotonic() + 300
        while wait and time.monotonic() < deadline:
            pool, _ = self.call("GET", "/v1/pools/base")
            if pool["ready"] == target and pool["restoring"] == 0:
                return
            time.sleep(0.02)
        if wait:
            raise SystemExit("the pool did not reach its target")


def percentile(samples, p):
    ordered = sorted(samples)
    at = min(len(ordered) - 1, max(0, round(p / 100 * (len(ordered) + 1)) - 1))
    return ordered[at]


def stamp():
    with open("/proc/cpuinfo") as file:
        model = next((l.split(":")[1].strip() for l in file if l.startswith("model name")), "")
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "cpu": model,
            "cores": os.cpu_count(), "kernel": platform.release(), "commit": commit.stdout.strip(),
            "load_before": os.getloadavg()[0]}


def report(name, what, samples, phases=None, extra=None, out=None, env=None):
    line = {p: round(percentile(samples, p), 3) for p in (50, 90, 99, 99.9)}
    print(f"{name:<24} n={len(samples):<5} p50 {line[50]:>8.2f}  p90 {line[90]:>8.2f}  "
          f"p99 {line[99]:>8.2f}  p99.9 {line[99.9]:>8.2f} ms   {what}")
    shares = {}
    if phases:
        total = statistics.mean(samples)
        shares = {k: {"mean_ms": round(statistics.mean(v), 3),
                      "share": round(statistics.mean(v) / total, 3)} for k, v in phases.items()}
        text = "  ".join(f"{k} {v['mean_ms']:.2f} ms ({v['share'] * 100:.0f}%)"
                         for k, v in shares.items())
        print(f"{'':<24} mean by phase: {text}")
    if extra:
        print(f"{'':<24} " + "  ".join(f"{k} {v}" for k, v in extra.items()))
    result = {"name": name, "what": what, "unit": "ms", "n": len(samples),
              "percentiles": {f"p{k}": v for k, v in line.items()}, "phases": shares,
              "extra": extra or {}, "environment": env, "samples_ms": [round(s, 4) for s in samples]}
    path = os.path.join(out, f"{name}.json")
    with open(path + ".tmp", "w") as file:
        json.dump(result, file, indent=1)
    os.replace(path + ".tmp", path)


def gather(phases, timings, names):
    for name in names:
        if name in timings:
            phases.setdefault(name, []).append(timings[name])


RESTORE = ("disk", "spawn", "load", "resume", "agent", "identity", "claim")


def bench_boot(run):
    """cold boot of the golden VM, from its manifest: systemd's own figures"""
    client = run.service.client()
    boot = client.call("GET", "/v1/templates/base")[0]["snapshot"]["boot_ms"]
    report("cold-boot", "VMM started to systemd running, nothing queued", [boot["total_ms"]],
           {"kernel": [boot["kernel_ms"]], "userspace": [boot["userspace_ms"]]},
           {"agent_ms": boot["agent_ms"], "settle_ms": boot["settle_ms"],
            "snapshot_ms": boot["snapshot_ms"]}, run.out, run.env)


def bench_claim(run):
    """warm claims, open loop at 5 a second, refill running"""
    client, other = run.service.client(), run.service.client()
    client.pool(8)
    rate, count = 5.0, int(run.seconds * 5)
    samples, phases, execs, origins = [], {}, [], {}
    started = time.monotonic()
    doomed = []
    lock = threading.Lock()
    stop = threading.Event()

    def reap():
        while not stop.is_set() or doomed:
            with lock:
                sandbox = doomed.pop(0) if doomed else None
            if sandbox is None:
                time.sleep(0.01)
                continue
            other.call("DELETE", f"/v1/sandboxes/{sandbox['id']}")

    reaper = threading.Thread(target=reap)
    reaper.start()
    for i in range(count):
        due = started + i / rate
        time.sleep(max(0, due - time.monotonic()))
        # Counted from when it was due: a slow claim must not hide the wait of the next one.
        late = (time.monotonic() - due) * 1e3
        sandbox, took = client.call("POST", "/v1/sandboxes", {"template": "base"})
        samples.append(took + max(0, late))
        gather(phases, sandbox["timings_ms"], ("resume", "claim", "register"))
        origins[sandbox["origin"]] = origins.get(sandbox["origin"], 0) + 1
        if i % 5 == 0:
            execs.append(client.execute(sandbox, ["/bin/true"])[1])
        with lock:
            doomed.append(sandbox)
    stop.set()
    reaper.join()
    report("claim", "POST /v1/sandboxes at 5/s with refill", samples, phases, {"origins": origins},
           run.out, run.env)
    report("first-exec", "first /bin/true after a warm claim", execs, None, None, run.out, run.env)


def bench_restore(run):
    """restores without a pool"""
    client = run.service.client()
    client.pool(0)
    samples, phases, guest = [], {}, []
    count = max(20, int(run.seconds / 2))
    for _ in range(count):
        sandbox, took = client.call("POST", "/v1/sandboxes", {"template": "base"})
        assert sandbox["origin"] == "restored", sandbox["origin"]
        samples.append(took)
        gather(phases, sandbox["timings_ms"], RESTORE)
        guest.append(sandbox["timings_ms"]["identity_guest"])
        client.call("DELETE", f"/v1/sandboxes/{sandbox['id']}")
    items = {i["item"]: i["micros"] for i in sandbox["identity"]["items"]}
    report("restore", "POST /v1/sandboxes with an empty pool, to identity proven and claimed",
           samples, phases, {"identity_in_guest_p50_ms": round(percentile(guest, 50), 2),
                             "last_items_micros": items}, run.out, run.env)


def bench_pause(run):
    """pause and resume of a workspace that changed 32 MiB"""
    client = run.service.client()
    client.pool(1)
    sandbox, _ = client.call("POST", "/v1/sandboxes", {"template": "base"})
    pauses, resumes, parts, back = [], [], {}, {}
    for i in range(max(5, int(run.seconds / 6))):
        client.execute(sandbox, ["sh", "-c", "head -c 33554432 /dev/urandom > /dev/shm/changed"])
        paused, took = client.call("POST", f"/v1/sandboxes/{sandbox['id']}/pause")
        pauses.append(took)
        gather(parts, paused["timings_ms"],
               ("freeze", "vmstate", "memory", "disk", "stack", "publish"))
        resumed, took = client.call("POST", f"/v1/sandboxes/{sandbox['id']}/resume")
        resumes.append(took)
        gather(back, resumed["timings_ms"], ("disk", "spawn", "load", "resume", "agent", "revive"))
    client.call("DELETE", f"/v1/sandboxes/{sandbox['id']}")
    report("pause", "32 MiB changed, to disk", pauses, parts, None, run.out, run.env)
    report("resume", "the same, back to the agent", resumes, back, None, run.out, run.env)


BENCHES = {"cold-boot": bench_boot, "claim": bench_claim, "restore": bench_restore,
           "pause": bench_pause}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    parser.add_argument("--filter", default="", help="only those whose name contains this")
    parser.add_argument("--seconds", type=float, default=60, help="aim of each benchmark")
    parser.add_argument("--out", default=os.path.join(TARGET, "bench"), help="for the JSON files")
    parser.add_argument("--binary", default=os.path.join(TARGET, "release", "rethaw"),
                        help="the rethaw to measure, for A/B")
    run = parser.parse_args()
    if run.list:
        for name, bench in BENCHES.items():
            print(f"{name:<12} {bench.__doc__}")
        return
    os.makedirs(run.out, exist_ok=True)
    run.env = stamp()
    run.service = Service(run.binary, os.environ.get("RETHAW_HOME", "/var/lib/rethaw"), 0)
    try:
        for name, bench in BENCHES.items():
            if run.filter in name:
                bench(run)
    finally:
        run.service.stop()


if __name__ == "__main__":
    sys.exit(main())
