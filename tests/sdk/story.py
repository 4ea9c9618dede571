"""Scenarios of the E2B SDK's tests: each is a function, told in a line, and counted."""

import os
import sys
import time
import traceback

SCENARIOS = []
# No wait for an event takes longer; ends at the event.
DEADLINE = 60


def scenario(function):
    """Registers a scenario; its docstring is what is printed."""
    SCENARIOS.append(function)
    return function


def wait_for(what, look):
    """Looks again and again until there is something."""
    until = time.monotonic() + DEADLINE
    while time.monotonic() < until:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"never came: {what}")


def raises(kind, function):
    """The exception that a call must end with."""
    try:
        value = function()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}, but {value!r}")


def tell(context):
    """Runs all scenarios in order; the exit status says whether all of them held."""
    failed = 0
    wanted = os.environ.get("SCENARIO", "")
    for function in SCENARIOS:
        if wanted not in function.__name__:
            continue
        started = time.monotonic()
        try:
            function(context)
            word = "ok"
        except BaseException:
            traceback.print_exc()
            word, failed = "FAILED", failed + 1
        took = time.monotonic() - started
        print(f"{word} {function.__name__}: {function.__doc__} ({took:.1f} s)", flush=True)
    print(f"{len(SCENARIOS)} scenarios, {failed} failed", flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # All is said. The interpreter's own end is left out: threads that the SDK leaves behind can crash
    # it there, after every scenario held.
    os._exit(1 if failed else 0)
