"""Rows, tables and processes that the benchmarks share.

A row is a dict {name, value, unit, peer, peer_value, ratio, ceiling_share, hardware, torch,
command}; what does not apply is left out. ratio: value / peer_value. ceiling_share: share of what
the machine could do at best, measured in the same run.
"""

import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

GB = 1e9


def hardware():
    """What the figures were measured on, in a few words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or 'a CPU'}"


def row(name, value, unit, peer=None, peer_value=None, ceiling_share=None):
    """A row of a benchmark; what is None is left out of it."""
    ratio = value / peer_value if peer_value else None
    entries = {"name": name, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value,
               "ratio": ratio, "ceiling_share": ceiling_share, "hardware": hardware(),
               "torch": torch.__version__, "command": " ".join(["python bench.py", *sys.argv[1:]])}
    return {key: entry for key, entry in entries.items() if entry is not None}


def table(rows):
    """The rows as aligned text."""
    lines = [("", "value", "unit", "peer", "its value", "ratio", "of ceiling")]
    for entry in rows:
        peer_value, ratio = entry.get("peer_value"), entry.get("ratio")
        share = entry.get("ceiling_share")
        lines.append((entry["name"], f"{entry['value']:.4g}", entry["unit"], entry.get("peer", ""),
                      "" if peer_value is None else f"{peer_value:.4g}",
                      "" if ratio is None else f"{ratio:.2f}",
                      "" if share is None else f"{share:.0%}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
                     for line in lines)


def in_fresh_process(function, *arguments):
    """function(*arguments) in a process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory():
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():         # getrusage's would begin with that of the process that started us
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
