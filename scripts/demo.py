"""The part of the demo that speaks HTTP: one connection, as a client would keep it."""

import http.client
import json
import os
import time

url = os.environ["RETHAW_URL"].removeprefix("http://")
with open(os.path.join(os.environ["RETHAW_HOME"], "api-key")) as file:
    key = file.read().strip()
connection = http.client.HTTPConnection(url, timeout=60)


def call(method, path, body=None, expect=(200, 201, 204)):
    started = time.perf_counter()
    data = None if body is None else json.dumps(body)
    connection.request(method, path, data, {"Authorization": f"Bearer {key}"})
    reply = connection.getresponse()
    text = reply.read()
    took = (time.perf_counter() - started) * 1e3
    if reply.status not in expect:
        raise SystemExit(f"{method} {path}: {reply.status} {text.decode()}")
    return (json.loads(text) if text else None), took


def execute(sandbox, *argv):
    path = f"/v1/sandboxes/{sandbox['id']}/exec?buffered=true"
    reply, took = call("POST", path, {"argv": list(argv)})
    if reply["exit_code"] != 0:
        raise SystemExit(f"{argv}: exit {reply['exit_code']}: {reply['stderr']}")
    return reply["stdout"].strip(), took


def wait_for_pool():
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pool = call("GET", "/v1/pools")[0]["items"][0]
        if pool["ready"] >= pool["target"]:
            return pool
        time.sleep(0.05)
    raise SystemExit("the pool did not fill within a minute")


def row(what, ms, note=""):
    print(f"  {what:<34} {ms:>9.1f} ms   {note}".rstrip())


template = call("GET", "/v1/templates/base")[0]
boot = template["snapshot"]["boot_ms"]
print("golden VM (made once):")
row("cold boot, to the agent", boot["agent_ms"])
row("cold boot, to systemd running", boot["total_ms"],
    f"kernel {boot['kernel_ms']:.0f} ms + userspace {boot['userspace_ms']:.0f} ms, by systemd")
row("settle", boot["settle_ms"])
row("snapshot", boot["snapshot_ms"])

# A restore without the pool: what a claim costs when nothing is parked.
wait_for_pool()
call("PUT", "/v1/pools/base", {"target": 0})
while call("GET", "/v1/pools/base")[0]["ready"]:
    time.sleep(0.02)
restored, took = call("POST", "/v1/sandboxes", {"template": "base"})
phases = restored["timings_ms"]
print(f"restore on the spot ({restored['vmm']}, origin {restored['origin']!r}):")
row("POST /v1/sandboxes", took, " + ".join(
    f"{name} {phases[name]:.0f}"
    for name in ("disk", "spawn", "load", "resume", "agent", "identity", "claim")
    if name in phases))
_, took = execute(restored, "/bin/true")
row("first command", took)
call("DELETE", f"/v1/sandboxes/{restored['id']}")
call("PUT", "/v1/pools/base", {"target": 4})
wait_for_pool()

sandbox, took = call("POST", "/v1/sandboxes", {"template": "base", "timeout_seconds": 600})
print(f"claim from the pool (origin {sandbox['origin']!r}):")
row("POST /v1/sandboxes", took)
output, took = execute(sandbox, "python3", "-c",
                       "import platform; print('hello from', platform.node(), 6 * 7)")
row("first python3 command", took, output)
identity = sandbox["identity"]
print(f"  identity: {identity['hostname']}  machine-id {identity['machine_id']}  "
      f"mac {identity['mac']}")

script = "(while :; do sleep 1; done) & echo $! > /tmp/pid; echo kept > /tmp/note"
execute(sandbox, "/bin/sh", "-c", f"{script}")
_, took = call("POST", f"/v1/sandboxes/{sandbox['id']}/pause")
print("pause and resume:")
row("pause (to disk, memory freed)", took)
resumed, took = call("POST", f"/v1/sandboxes/{sandbox['id']}/resume")
row("resume", took)
output, took = execute(resumed, "/bin/sh", "-c",
                       "kill -0 $(cat /tmp/pid) && cat /tmp/note")
row("first command after it", took, f"background process alive, file says {output!r}")
call("DELETE", f"/v1/sandboxes/{sandbox['id']}")
print("demo done")
