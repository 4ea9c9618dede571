"""Every benchmark, by name. A file in cases/ adds its own with `@bench`."""

import importlib
import os
import pkgutil

BENCHES = {}


def bench(name):
    """Registers a function `run -> None`; its doc string is its description."""
    def add(function):
        if name in BENCHES:
            raise ValueError(f"two benchmarks are named {name}")
        BENCHES[name] = function
        return function
    return add


def load_all():
    cases = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cases")
    for module in sorted(m.name for m in pkgutil.iter_modules([cases])):
        importlib.import_module(f"cases.{module}")
    return BENCHES
