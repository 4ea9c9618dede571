"""A real service, and clients that measure outside it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time

READY_SECONDS = 1500
STOP_SECONDS = 60


class Service:
    """A service on a port of its own. Artefacts come from `home`."""

    def __init__(self, binary, home, pool=0, flags=()):
        self.home = home
        self.log = tempfile.NamedTemporaryFile("w+", prefix="rethaw-bench-", suffix=".log")
        self.process = subprocess.Popen(
            [binary, "serve", "--listen", "127.0.0.1:0", "--home", home,
             "--pool-target", str(pool), *flags],
            stderr=self.log, stdout=self.log, env={**os.environ, "NO_COLOR": "1"})
        try:
            self.address = self._wait_for_address()
            self._wait_ready()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _wait_for_address(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with open(self.log.name) as log:
                for line in log:
                    if "listening on http://" in line:
                        return line.split("listening on http://")[1].strip()
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise SystemExit("service did not start:\n" + self.log_text())

    def _wait_ready(self):
        deadline = time.monotonic() + READY_SECONDS
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
        raise SystemExit("service is not ready:\n" + self.log_text())

    def log_text(self):
        with open(self.log.name) as log:
            return log.read()

    def client(self):
        return Client(self.address, self.key)

    def stop(self):
        if self.process.poll() is not None:
            raise SystemExit("the service ended by itself:\n" + self.log_text()[-4000:])
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise SystemExit(f"the service did not stop within {STOP_SECONDS} s") from None


class CallFailed(Exception):
    """An answer of 400 or more."""

    def __init__(self, what, status, text):
        super().__init__(f"{what}: {status} {text}")
        self.status = status


class Client:
    """One kept connection. Times are from sending a request to having read the reply."""

    def __init__(self, address, key):
        self.address, self.socket = address, None
        self.connection = http.client.HTTPConnection(address, timeout=120)
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body)
        started = time.perf_counter()
        self.connection.request(method, path, data, self.headers)
        reply = self.connection.getresponse()
        text = reply.read()
        took = (time.perf_counter() - started) * 1e3
        if reply.status >= 400:
            raise CallFailed(f"{method} {path}", reply.status, text.decode(errors="replace"))
        return (json.loads(text) if text else None), took

    def send(self, method, path, data, headers=None):
        """Bytes, whatever they are."""
        self.connection.request(method, path, data, {**self.headers, **(headers or {})})
        reply = self.connection.getresponse()
        text = reply.read()
        if reply.status >= 400:
            raise CallFailed(f"{method} {path}", reply.status, text.decode(errors="replace"))

    def create(self, template="base", **more):
        """As `call`, without the HTTP library, which takes longer than a claim's network: a prepared
        request on an open connection, until the last byte of the reply."""
        data = json.dumps({"template": template, **more}).encode()
        head = f"POST /v1/sandboxes HTTP/1.1\r\nHost: {self.address}\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in self.headers.items())
        request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        if self.socket is None:
            host, port = self.address.rsplit(":", 1)
            self.socket = socket.create_connection((host, int(port)), 120)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.perf_counter()
        self.socket.sendall(request)
        reply = b""
        while True:
            piece = self.socket.recv(1 << 16)
            if not piece:
                raise SystemExit(f"POST /v1/sandboxes: the connection broke after {reply!r}")
            reply += piece
            end = reply.find(b"\r\n\r\n")
            length = end >= 0 and re.search(rb"(?i)\r\ncontent-length: (\d+)", reply[:end])
            if length and len(reply) >= end + 4 + int(length[1]):
                break
        took = (time.perf_counter() - started) * 1e3
        status, text = int(reply[9:12]), reply[end + 4:].decode(errors="replace")
        if status >= 400:
            raise CallFailed("POST /v1/sandboxes", status, text)
        return json.loads(text), took

    def delete(self, sandbox):
        return self.call("DELETE", f"/v1/sandboxes/{sandbox['id']}")[1]

    def act(self, sandbox, action, body=None):
        return self.call("POST", f"/v1/sandboxes/{sandbox['id']}/{action}", body or {})

    def execute(self, sandbox, argv):
        path = f"/v1/sandboxes/{sandbox['id']}/exec?buffered=true"
        reply, took = self.call("POST", path, {"argv": argv})
        if reply["exit_code"] != 0:
            raise SystemExit(f"{argv}: {reply}")
        return reply, took

    def pool(self, target, template="base", wait=True):
        """Sets a pool's target; returns the seconds it took to be reached."""
        started = time.monotonic()
        self.call("PUT", f"/v1/pools/{template}", {"target": target})
        while wait:
            pool, _ = self.call("GET", f"/v1/pools/{template}")
            if pool["ready"] == target and pool["restoring"] == 0:
                break
            if time.monotonic() - started > 600:
                raise SystemExit(f"the pool did not reach {target} in 10 minutes: {pool}")
            time.sleep(0.01)
        return time.monotonic() - started
