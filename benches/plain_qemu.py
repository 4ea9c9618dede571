"""QEMU driven by a plain script: the machine of a rethaw template, without rethaw.

The command line is the one of a VM that rethaw runs, so both restore the same snapshot on the same
machine; only where sockets and memory are differs. Commands go to the same guest agent through
`agent_probe`, an example program of the guest agent's crate.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import time

DEADLINE = 120


class PlainQemu:
    """One QEMU process of `machine`, in a directory of its own."""

    def __init__(self, machine, directory, memory, start):
        os.makedirs(directory)
        self.dir = directory
        shutil.copyfile(machine["scratch"], f"{directory}/scratch.img")
        swap = [(r"socket,id=qmp,fd=\d+", f"socket,id=qmp,path={directory}/qmp.sock"),
                (r"socket,id=agent,fd=\d+", f"socket,id=agent,path={directory}/agent.sock"),
                (r"memory-backend-file,id=mem,(size=\d+).*", memory),
                (r"(id=scratch,.*file\.filename=).*", rf"\g<1>{directory}/scratch.img")]
        arguments = machine["arguments"]
        for pattern, by in swap:
            arguments = [re.sub(f"^{pattern}", by, a) for a in arguments]
        at = arguments.index("-incoming")
        arguments[at - 1:at + 2] = start
        self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def wait_for(self, name):
        deadline = time.monotonic() + DEADLINE
        while not os.path.exists(f"{self.dir}/{name}"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"plain QEMU: {self.process.stderr.read().decode()}")
            time.sleep(0.001)
        return f"{self.dir}/{name}"

    def load(self, vmstate):
        """Device state in, vCPUs running."""
        qmp = socket.socket(socket.AF_UNIX)
        qmp.settimeout(DEADLINE)
        qmp.connect(self.wait_for("qmp.sock"))
        self.qmp = qmp.makefile("rw")
        self.qmp.readline()
        self.command("qmp_capabilities")
        self.command("migrate-set-capabilities", capabilities=[
            {"capability": "x-ignore-shared", "state": True},
            {"capability": "events", "state": True}])
        self.command("migrate-incoming", uri=f"exec:cat {vmstate}")
        while True:
            message = json.loads(self.qmp.readline())
            status = message.get("data", {}).get("status")
            if message.get("event") == "MIGRATION" and status == "completed":
                break
            if status == "failed":
                raise SystemExit("plain QEMU: the device state does not load")
        self.command("cont")

    def command(self, name, **arguments):
        self.qmp.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self.qmp.flush()
        while True:
            message = json.loads(self.qmp.readline())
            if "error" in message:
                raise SystemExit(f"plain QEMU: {name}: {message['error']}")
            if "return" in message:
                return

    def agent(self, probe, *call):
        run = subprocess.run([probe, self.wait_for("agent.sock"), *call], capture_output=True,
                             text=True, timeout=DEADLINE)
        if run.returncode != 0:
            raise SystemExit(f"agent_probe {call}: {run.stdout}{run.stderr}")
        return run.stdout

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        shutil.rmtree(self.dir)
