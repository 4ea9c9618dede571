"""What a benchmark says: a line for people, a JSON file with every sample for everybody else."""

import json
import os
import platform
import statistics
import subprocess
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def percentile(samples, p):
    """Nearest rank: a sample that really happened."""
    ordered = sorted(samples)
    at = min(len(ordered) - 1, max(0, round(p / 100 * (len(ordered) + 1)) - 1))
    return ordered[at]


def stamp(binary):
    """Where and on what it ran."""
    with open("/proc/cpuinfo") as file:
        model = next((l.split(":")[1].strip() for l in file if l.startswith("model name")), "")
    with open("/proc/meminfo") as file:
        memory_kib = int(file.readline().split()[1])
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    version = subprocess.run([binary, "version", "--client"], capture_output=True, text=True)
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "cpu": model,
            "cores": os.cpu_count(), "memory_bytes": memory_kib * 1024,
            "kernel": platform.release(), "commit": commit.stdout.strip(),
            "rethaw": version.stdout.strip(), "load_before": os.getloadavg()[0]}


class Report:
    """Collects the results of one run and writes each as it comes."""

    def __init__(self, out, environment, label=""):
        self.out, self.environment, self.label = out, environment, label
        self.medians = {}
        os.makedirs(out, exist_ok=True)

    def samples(self, name, what, samples, phases=None, extra=None):
        """Latencies in milliseconds, with the mean and share of each phase."""
        if not samples:
            raise SystemExit(f"{name}: no sample was taken")
        line = {p: round(percentile(samples, p), 3) for p in (50, 90, 99, 99.9)}
        print(f"{self.label}{name:<26} n={len(samples):<5} p50 {line[50]:>8.2f}  "
              f"p90 {line[90]:>8.2f}  p99 {line[99]:>8.2f}  p99.9 {line[99.9]:>8.2f} ms   {what}")
        total = statistics.mean(samples)
        shares = {k: {"mean_ms": round(statistics.mean(v), 3),
                      "share": round(statistics.mean(v) / total, 3)}
                  for k, v in (phases or {}).items() if v}
        if shares:
            print(" " * 27 + "mean by phase: " + "  ".join(
                f"{k} {v['mean_ms']:.2f} ms ({v['share'] * 100:.0f}%)" for k, v in shares.items()))
        self._extra(extra)
        self.medians[name] = line[50]
        self._write(name, {
            "name": name, "what": what, "unit": "ms", "n": len(samples),
            "percentiles": {f"p{k}": v for k, v in line.items()}, "phases": shares,
            "extra": extra or {}, "samples_ms": [round(s, 4) for s in samples]})

    def facts(self, name, what, facts):
        """Numbers that are no latencies."""
        print(f"{self.label}{name:<26} {what}")
        self._extra(facts)
        self._write(name, {"name": name, "what": what, "facts": facts})

    def rows(self, name, what, rows):
        """A table: one dictionary a row, the same keys in each."""
        print(f"{self.label}{name:<26} {what}")
        keys = list(rows[0])
        widths = [max(len(k), *(len(_cell(r[k])) for r in rows)) for k in keys]
        for cells in [keys] + [[_cell(r[k]) for k in keys] for r in rows]:
            print(" " * 27 + "  ".join(c.rjust(w) for c, w in zip(cells, widths)))
        self._write(name, {"name": name, "what": what, "rows": rows})

    def _extra(self, extra):
        if extra:
            print(" " * 27 + "  ".join(f"{k} {_cell(v)}" for k, v in extra.items()))

    def _write(self, name, result):
        result["environment"] = self.environment
        path = os.path.join(self.out, f"{name}.json")
        with open(path + ".tmp", "w") as file:
            json.dump(result, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)


def _cell(value):
    return f"{value:.2f}" if isinstance(value, float) else str(value)
