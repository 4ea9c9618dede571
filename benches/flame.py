"""A flame graph of the whole host while a benchmark runs: perf's samples, as folded stacks and SVG.

Needs `perf` (Debian: linux-perf) and the right to use it. Stacks are unwound by their DWARF tables,
so that QEMU as the distribution ships it has some, too; code that QEMU has translated has none.
"""

import collections
import html
import os
import re
import subprocess

HERTZ = 199
# Of each stack, that much is kept: perf's own default, deep enough for all that matters here.
STACK_BYTES = 8192
WIDTH, ROW = 1200, 16
# Narrower boxes cannot be seen.
LEAST = 0.4
SAMPLE = re.compile(r"^(\S.*?)\s+(?:\d+\s+)?[\d.]+:\s")
FRAME = re.compile(r"^\s+[0-9a-f]+ (.*?)(?:\+0x[0-9a-f]+)? \((.*)\)$")
HASH = re.compile(r"::h[0-9a-f]{16}$")


class Profile:
    """Records from its making to `end`."""

    def __init__(self, base):
        self.base = base
        self.data = base + ".perf"
        os.makedirs(os.path.dirname(base), exist_ok=True)
        self.perf = subprocess.Popen(
            ["perf", "record", "-q", "-a", "-F", str(HERTZ), "-o", self.data,
             "--call-graph", f"dwarf,{STACK_BYTES}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def end(self):
        """Stops, and writes BASE.folded and BASE.svg; returns the stacks with their counts."""
        self.perf.terminate()
        _, said = self.perf.communicate(timeout=60)
        if not os.path.exists(self.data):
            raise RuntimeError(f"perf record: {said.decode(errors='replace').strip()}")
        stacks = folded(self.data)
        os.unlink(self.data)
        with open(self.base + ".folded", "w") as out:
            for stack, count in sorted(stacks.items()):
                out.write(f"{';'.join(stack)} {count}\n")
        with open(self.base + ".svg", "w") as out:
            out.write(svg(stacks))
        return stacks


def folded(data):
    """Counts equal stacks, outermost frame first, below the name of the thread."""
    script = subprocess.Popen(
        ["perf", "script", "--no-inline", "-i", data, "-F", "comm,time,ip,sym,dso"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace")
    stacks, thread, frames = collections.Counter(), None, []
    for line in script.stdout:
        if not line.strip():
            if thread and thread != "swapper":
                stacks[(thread, *reversed(frames))] += 1
            thread, frames = None, []
        elif thread is None:
            found = SAMPLE.match(line)
            thread = found.group(1) if found else line.split()[0]
        else:
            found = FRAME.match(line)
            if found:
                frames.append(named(*found.groups()))
    script.wait()
    return stacks


def named(symbol, binary):
    """A frame's name: the function, or where it has none the file it is in."""
    if symbol == "[unknown]":
        # What a VMM runs from anonymous memory is the guest, translated.
        return "guest" if binary in ("[unknown]", "//anon") else f"[{os.path.basename(binary)}]"
    return HASH.sub("", symbol).replace(";", ":")


def svg(stacks):
    """Boxes as wide as their share of all samples; the names are in tooltips, too."""
    total = sum(stacks.values()) or 1
    tree = {}
    for stack, count in stacks.items():
        level = tree
        for frame in stack:
            entry = level.setdefault(frame, [0, {}])
            entry[0] += count
            level = entry[1]
    boxes, deepest = [], 0
    todo = [(tree, 0.0, 0)]
    while todo:
        level, left, depth = todo.pop()
        for name, (count, below) in sorted(level.items()):
            width = count / total * WIDTH
            if width >= LEAST:
                boxes.append((left, depth, width, name, count))
                deepest = max(deepest, depth)
                todo.append((below, left, depth + 1))
            left += width
    height = (deepest + 1) * ROW
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
           'font-family="monospace" font-size="11">']
    for left, depth, width, name, count in boxes:
        top = height - (depth + 1) * ROW
        text = html.escape(name)
        shown = html.escape(name[:int(width / 7)]) if width > 20 else ""
        hue = 10 + sum(name.encode()) % 45
        out.append(
            f'<g><title>{text}: {count} samples, {100 * count / total:.1f} %</title>'
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW - 1}" '
            f'fill="hsl({hue},80%,65%)"/><text x="{left + 2:.1f}" y="{top + 12}">{shown}</text></g>')
    out.append("</svg>\n")
    return "\n".join(out)


def summary(stacks, most=12):
    """Where the time is: by thread, and the functions that have most of it themselves."""
    total = sum(stacks.values()) or 1
    threads, own = collections.Counter(), collections.Counter()
    for stack, count in stacks.items():
        threads[stack[0]] += count
        own[(stack[0], stack[-1])] += count
    lines = ["  by thread: " + "  ".join(
        f"{name} {100 * count / total:.0f}%" for name, count in threads.most_common(8))]
    for (thread, function), count in own.most_common(most):
        lines.append(f"  {100 * count / total:5.1f}%  {thread:<16} {function[:90]}")
    return "\n".join(lines)
