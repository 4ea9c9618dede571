"""Networks: what they cost a claim, how fast slots are made, what the port proxy takes."""

import http.client
import statistics
import time

from registry import bench

BLOCK = 60
ROUNDS = 3
MIB = 1 << 20
SIZE = 64 * MIB
SERVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header('Content-Length', str(%d))
        self.end_headers()
        chunk = bytes(1 << 16)
        for _ in range(%d): self.wfile.write(chunk)
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(('0.0.0.0', 8000), Handler).serve_forever()
""" % (SIZE, SIZE >> 16)


def claims(client, **more):
    """Warm claims, one at a time, each after the pool is full again."""
    samples = []
    for _ in range(BLOCK):
        client.pool(4)
        sandbox, took = client.create(**more)
        if sandbox["origin"] == "warm":
            samples.append(took)
        client.delete(sandbox)
    return samples


def metric(client, name):
    """A metric without labels, from /metrics."""
    client.connection.request("GET", "/metrics")
    text = client.connection.getresponse().read().decode()
    for line in text.splitlines():
        if line.startswith(name + " "):
            return float(line.split()[1])
    raise SystemExit(f"no {name} in /metrics")


@bench("network-claim")
def network_claim(run):
    """warm claims with and without a network, turn and turn about; and how fast slots were made"""
    found = {"on": [], "off": []}
    made = count = 0.0
    for _ in range(ROUNDS):
        for mode in ("off", "on"):
            client = run.own_service("--network", mode, pool=4).client()
            # Another policy than a parked VM's, so that rules are really set in the claim.
            more = {"internet": {"allow": ["192.0.2.0/24"]}} if mode == "on" else {}
            found[mode] += claims(client, **more)
            if mode == "on":
                name = "rethaw_net_slot_prepare_duration_seconds"
                made += metric(client, name + "_sum")
                count += metric(client, name + "_count")
    for mode, samples in found.items():
        run.report.samples(f"network-claim-{mode}", f"warm claim, --network {mode}", samples)
    more = statistics.median(found["on"]) - statistics.median(found["off"])
    run.report.facts("network-cost", "what a network adds to a claim, and the making of a slot",
                     {"claim_ms": round(more, 3), "slot_ms": round(made / count * 1e3, 3),
                      "slots": int(count)})


def download(address, path, headers):
    """MiB/s of one download."""
    connection = http.client.HTTPConnection(address, timeout=120)
    started = time.perf_counter()
    connection.request("GET", path, headers=headers)
    size = len(connection.getresponse().read())
    if size != SIZE:
        raise SystemExit(f"{address}{path}: {size} of {SIZE} bytes")
    return SIZE / MIB / (time.perf_counter() - started)


@bench("network-proxy")
def network_proxy(run):
    """a download from a port of a sandbox: through the service, and directly from this host"""
    service = run.own_service("--network", "on", pool=1)
    client = service.client()
    sandbox, _ = client.create(internet="off")
    start = f"setsid python3 -c \"{SERVER}\" >/dev/null 2>&1 &"
    client.execute(sandbox, ["sh", "-c", start])
    path = f"/v1/sandboxes/{sandbox['id']}/ports/8000/"
    token = {"X-Access-Token": sandbox["access_token"]}
    direct = f"{sandbox['network']['ipv4']}:8000"
    rates = {"proxied": [], "direct": []}
    deadline = time.monotonic() + 60
    while True:
        try:
            download(direct, "/", {})
            break
        except ConnectionRefusedError:
            # An emulated Python takes its time to listen.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    for _ in range(5):
        rates["proxied"].append(download(service.address, path, token))
        rates["direct"].append(download(direct, "/", {}))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    client.delete(sandbox)
    run.report.facts("network-proxy", f"{SIZE // MIB} MiB over HTTP, medians of 5, MiB/s",
                     {**medians, "ratio": medians["proxied"] / medians["direct"]})
