"""Fresh random numbers for Python processes that live on in clones of their machine.

    import rethaw_reseed
    rethaw_reseed.install()                    # random, ssl
    rethaw_reseed.on_restore(numpy.random.seed)  # anything else, called without arguments

A clone gets a new kernel generator and a new /run/rethaw/generation before any of its processes
runs again. The file is always rewritten in place and lies in memory, so a process can map it and
notice the change by comparing a few bytes:

* `random` compares before every number. There is no number from the old state in a clone.
* `ssl` and whatever is registered with `on_restore` are called as soon as the main thread runs
  Python code again; the hook `50-python-reseed` sends the signal for it (SIGURG, which processes
  that do not know it ignore). Without the hook they are called with the next number of `random`.

Functions that were taken out of `random` before (`from random import random`) are not covered:
install first, for one from `sitecustomize.py`.
"""

import mmap
import os
import random
import signal
import threading

GENERATION = "/run/rethaw/generation"
REGISTER = "/run/rethaw/reseed.d"

_callbacks = []
_lock = threading.RLock()
_map = None
_seen = None


def _generation():
    return bytes(_map)


def check(*_):
    """Calls everything that is registered if this process has come to live in another machine."""
    global _seen
    if _map is None or _generation() == _seen:
        return
    with _lock:
        now = _generation()
        if now == _seen:
            return
        _seen = now
        for callback in _callbacks:
            callback()


def on_restore(callback):
    """Has `callback` called, without arguments, in every clone this process wakes up in."""
    _callbacks.append(callback)


class _Random(random.Random):
    """Every other method comes down to these two."""

    def random(self):
        check()
        return super().random()

    def getrandbits(self, bits):
        check()
        return super().getrandbits(bits)


def _install_random():
    old, new = random._inst, _Random()
    new.setstate(old.getstate())
    random._inst = new
    for name in dir(random):
        if getattr(getattr(random, name), "__self__", None) is old:
            setattr(random, name, getattr(new, name))
    # The kernel's generator is a new one already: nothing but a seed is needed.
    on_restore(new.seed)


def _install_ssl():
    try:
        import ssl
    except ImportError:
        return
    # Makes OpenSSL's generators, those of all threads, take fresh bytes from the kernel.
    on_restore(lambda: ssl.RAND_add(os.urandom(32), 0.0))


def _register():
    os.makedirs(REGISTER, exist_ok=True)
    with open(os.path.join(REGISTER, str(os.getpid())), "w"):
        pass


def install():
    """Looks after this process. Call it from the main thread, before anything else."""
    global _map, _seen
    with open(GENERATION, "rb") as file:
        _map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    _seen = _generation()
    _install_random()
    _install_ssl()
    signal.signal(signal.SIGURG, check)
    try:
        _register()
    except OSError:
        # Not root, and nobody made the folder for it: `random` is looked after all the same.
        pass
