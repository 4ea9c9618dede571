"""Benchmarks of a real service on real VMs.

Each prints n, p50, p90, p99, p99.9 and the share of each phase, and writes its raw samples with a
stamp of the machine to DIR/NAME.json. With --against BINARY the same benchmarks run with another
rethaw too, turn and turn about, and the ratio of the medians is printed. With --profile a flame
graph of each is written to DIR/NAME.svg; the times are then those of a host that is being watched.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import flame  # noqa: E402
from registry import load_all  # noqa: E402
from report import ROOT, Report, stamp  # noqa: E402
from service import Service  # noqa: E402

TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))


class Run:
    """What a benchmark gets: a service when it asks for one, a report, and how long to take."""

    def __init__(self, binary, home, out, seconds, label=""):
        self.binary, self.home, self.seconds = binary, home, seconds
        self.report = Report(out, stamp(binary), label)
        self._service = None

    @property
    def service(self):
        """The service with an empty pool that benchmarks share; started on first use."""
        if self._service is None:
            self._service = Service(self.binary, self.home)
        return self._service

    def own_service(self, *flags, pool=0):
        """A service with flags of its own. One home has one service, so the shared one goes."""
        self.stop()
        self._service = Service(self.binary, self.home, pool, flags)
        return self._service

    def stop(self):
        service, self._service = self._service, None
        if service:
            service.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    parser.add_argument("--filter", default="", help="only those whose name contains this")
    parser.add_argument("--seconds", type=float, default=60, help="aim of each benchmark")
    parser.add_argument("--out", default=os.path.join(TARGET, "bench"), help="for the JSON files")
    parser.add_argument("--binary", default=os.path.join(TARGET, "release", "rethaw"),
                        help="the rethaw to measure")
    parser.add_argument("--profile", action="store_true", help="flame graphs; needs perf")
    parser.add_argument("--against", help="another rethaw, for A/B")
    options = parser.parse_args()
    benches = {n: f for n, f in load_all().items() if options.filter in n}
    if options.list:
        for name, function in benches.items():
            print(f"{name:<16} {function.__doc__.strip().splitlines()[0]}")
        return 0
    if not benches:
        print(f"no benchmark's name contains {options.filter!r}; see --list", file=sys.stderr)
        return 64
    home = os.environ.get("RETHAW_HOME", "/var/lib/rethaw")
    runs = [Run(options.binary, home, options.out, options.seconds)]
    if options.against:
        runs[0].report.label = "A "
        runs.append(Run(options.against, home, os.path.join(options.out, "against"),
                        options.seconds, "B "))
    try:
        for name, function in benches.items():
            for run in runs:
                profile = flame.Profile(os.path.join(options.out, name)) if options.profile else None
                try:
                    function(run)
                finally:
                    if profile:
                        print(flame.summary(profile.end()))
                # The other binary needs the home; alone, the service is kept.
                if len(runs) > 1:
                    run.stop()
    finally:
        for run in runs:
            run.stop()
    if options.against:
        for name, median in runs[0].report.medians.items():
            other = runs[1].report.medians.get(name)
            if other:
                print(f"{name:<26} A/B {median / other:.3f} (medians {median:.2f} and {other:.2f} ms)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
