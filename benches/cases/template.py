"""Derived templates: what a build takes and stores, and what a warm process is worth."""

import hashlib
import io
import os
import subprocess
import tarfile
import time

from registry import bench
from report import ROOT, percentile

EXAMPLE = os.path.join(ROOT, "examples", "numpy")
FETCHED = os.path.join(os.environ.get("RETHAW_HOME", "/var/lib/rethaw"), "numpy")
EXPRESSION = "numpy.linalg.norm(numpy.arange(10.0))"
SITE = "/usr/local/lib/python3.11/dist-packages"
UNPACK = f"python3 -m zipfile -e /opt/wheels/numpy-*.whl {SITE}"
COLD = ["python3", "-c", f"import numpy; print({EXPRESSION})"]


def archive(folder):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, _, files in sorted(os.walk(folder)):
            for name in sorted(files):
                full = os.path.join(path, name)
                info = tar.gettarinfo(full, os.path.relpath(full, folder))
                info.mtime, info.uid, info.gid, info.uname, info.gname = 1, 0, 0, "", ""
                with open(full, "rb") as file:
                    tar.addfile(info, file)
    return buffer.getvalue()


def upload(client, data):
    digest = hashlib.sha256(data).hexdigest()
    client.send("PUT", f"/v1/inputs/{digest}", data)
    return digest


def build(client, name, steps, parent="base"):
    """Builds a template anew; gives it and the seconds it took."""
    started = time.monotonic()
    client.call("POST", "/v1/templates", {"name": name, "from": parent, "steps": steps})
    while True:
        template, _ = client.call("GET", f"/v1/templates/{name}")
        if template["state"] in ("ready", "failed"):
            break
        time.sleep(0.05)
    if template["state"] == "failed":
        raise SystemExit(f"template {name}: {template['error']}")
    return template, time.monotonic() - started


def sizes(template):
    snapshot = template["snapshot"]
    mib = {k: round(snapshot[k] / 2**20, 1) for k in (
        "memory_layer_bytes", "disk_layer_bytes", "allocated_bytes", "bytes")}
    return {"memory_layer_mib": mib["memory_layer_bytes"], "disk_layer_mib": mib["disk_layer_bytes"],
            "real_mib": mib["allocated_bytes"], "apparent_mib": mib["bytes"]}


def numpy_steps(client):
    """The example's steps, and those of the same without a process that runs."""
    subprocess.run([os.path.join(EXAMPLE, "fetch"), FETCHED], check=True)
    copies = [{"copy": {"dst": "/", "archive_sha256": upload(client, archive(folder))}}
              for folder in (os.path.join(EXAMPLE, "files"), FETCHED)]
    install = {"run": f"set -e; {UNPACK}; rm -r /opt/wheels; chmod 755 /usr/local/bin/ask-numpy "
                      "/etc/rethaw/restore.d/50-python-reseed"}
    installed = copies + [install, {"check": f"python3 -c 'import numpy; print({EXPRESSION})'"}]
    warm = copies + [install, {"start": "exec python3 /opt/numpy/warm.py"},
                     {"wait": {"port": 8500}}, {"check": f"ask-numpy '{EXPRESSION}'"}]
    return installed, warm


def first_results(client, template, count, argv, before=None):
    """From asking for a sandbox to the first result, an empty pool or a parked VM behind it."""
    times, result = [], None
    for _ in range(count):
        started = time.perf_counter()
        sandbox, _ = client.create(template)
        if before:
            before(sandbox)
        reply, _ = client.execute(sandbox, argv)
        times.append((time.perf_counter() - started) * 1e3)
        client.delete(sandbox)
        result = reply["stdout"].strip()
        if not result.startswith("16.88"):
            raise SystemExit(f"{argv}: {result}")
    return times


def warm_first_results(client, template, count, argv):
    times = []
    for _ in range(count):
        client.pool(1, template)
        times += first_results(client, template, 1, argv)
    client.pool(0, template)
    return times


@bench("numpy")
def numpy(run):
    """from a request to numpy's first result, with and without a template that has it imported"""
    client = run.service.client()
    client.pool(0)
    installed, warm = numpy_steps(client)
    templates = {"numpy-installed": installed, "numpy-warm": warm}
    facts = {}
    try:
        for name, steps in templates.items():
            template, took = build(client, name, steps)
            facts |= {f"{name}_build_s": round(took, 1), f"{name}_cached": template["cached"]}
            facts |= {f"{name}_{k}": v for k, v in sizes(template).items()}
        count = max(5, int(run.seconds / 6))
        ask = ["ask-numpy", EXPRESSION]
        run.report.samples("numpy-warm", "a parked sandbox whose Python has imported numpy",
                           warm_first_results(client, "numpy-warm", count, ask))
        run.report.samples("numpy-restored", "the same, restored on the spot",
                           first_results(client, "numpy-warm", count, ask))
        run.report.samples("numpy-installed", "a parked sandbox with numpy installed, import and all",
                           warm_first_results(client, "numpy-installed", max(3, count // 3), COLD))

        def install(sandbox):
            # What a user without a template does: upload, unpack, import.
            data = archive(FETCHED)
            client.send("PUT", f"/v1/sandboxes/{sandbox['id']}/files?path=/", data,
                        {"Content-Type": "application/x-tar"})
            client.execute(sandbox, ["sh", "-c", UNPACK])

        run.report.samples("numpy-none", "a sandbox of base: upload the wheel, unpack, import",
                           first_results(client, "base", 3, COLD, install))
        run.report.facts("numpy-templates", "what the builds took and store", facts)
    finally:
        for name in templates:
            try:
                client.call("DELETE", f"/v1/templates/{name}")
            except Exception as e:  # noqa: BLE001 - the first error is the one to see
                print(f"{name} stays: {e}")


@bench("layers")
def layers(run):
    """template layers by what their steps changed: build time, stored bytes, restore on top"""
    client = run.service.client()
    client.pool(0)
    rows, made, parent = [], [], "base"
    try:
        for depth, mib in enumerate((0, 8, 32, 32)):
            name = f"layer-{depth}"
            # In memory (/dev/shm is the guest's memory) and on disk, half of it each.
            half = mib << 19
            steps = [{"run": f"head -c {half} /dev/urandom > /dev/shm/{name}; "
                             f"head -c {half} /dev/urandom > /root/{name}"}]
            template, took = build(client, name, steps, parent)
            made.append(name)
            parent = name
            again, _ = client.call("POST", "/v1/templates", {
                "name": name, "from": template["from"], "steps": steps})
            times = []
            for _ in range(10):
                sandbox, took_ms = client.create(name)
                times.append(took_ms)
                client.delete(sandbox)
            rows.append({"layers": template["snapshot"]["layers"], "changed_mib": mib,
                         "build_s": took, **sizes(again),
                         "restore_p50_ms": percentile(times, 50)})
    finally:
        for name in reversed(made):
            client.call("DELETE", f"/v1/templates/{name}")
    run.report.rows("layers", layers.__doc__, rows)
