"""Has numpy imported, and evaluates one expression a connection.

This is a sandbox: whoever can connect may run anything in it anyway.
"""

import socket
import sys

sys.path.insert(0, "/opt/rethaw")
import rethaw_reseed

import numpy

rethaw_reseed.install()
rethaw_reseed.on_restore(numpy.random.seed)
# What is imported and computed once is there in every clone.
numpy.linalg.norm(numpy.random.random(100) @ numpy.random.random((100, 100)))

listener = socket.create_server(("127.0.0.1", 8500))
while True:
    connection, _ = listener.accept()
    with connection, connection.makefile("rw") as stream:
        expression = stream.readline()
        # One that only looks whether the port is open says nothing.
        if not expression:
            continue
        rethaw_reseed.check()
        try:
            answer = eval(expression, {"numpy": numpy})
        except Exception as e:
            answer = repr(e)
        try:
            print(answer, file=stream, flush=True)
        except OSError:
            pass
