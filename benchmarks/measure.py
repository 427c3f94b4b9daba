"""Rows, clocks, the ceiling, and processes that measure one variant each.

A row is a dict {name, variant, what, value, unit} and, where they apply, {peer, peer_value, ratio,
ceiling_share}. ratio: value / peer_value; ceiling_share: share of what a large bf16 product has in
the same run. Each variant has a process of its own, so its peak memory is its own too.
"""

import math
import multiprocessing
import os
import re
import sys
import time
import traceback
from pathlib import Path

import torch

from runtime import cost

GB = 1e9
CEILING = "sustained bf16 product"
SUSTAINED = 4.0                         # seconds of products, after which a GPU runs at its limit
SHOWN = 12                              # last lines of an error that are shown


# ---- rows

def row(variant, what, value, unit, **more):
    """A row. more: `flops` a second, which becomes a share of the ceiling; other notes."""
    return {"name": f"{variant}, {what}" if what else variant, "variant": variant, "what": what,
            "value": value, "unit": unit, **more}


def finish(rows, peers):
    """Puts peers' values, shares of the ceiling, and where they were measured into rows.

    peers: {variant: variants that it is compared with}; the first that has the same row counts.
    """
    found = {(entry["variant"], entry["what"]): entry["value"] for entry in rows}
    best = found.get((CEILING, ""))
    about = {"hardware": hardware(), "torch": torch.__version__,
             "command": " ".join(["python -m benchmarks", *sys.argv[1:]])}
    for entry in rows:
        for peer in peers.get(entry["variant"], ()):
            value = found.get((peer, entry["what"]))
            if value and "peer" not in entry:
                entry |= {"peer": peer, "peer_value": value, "ratio": entry["value"] / value}
        flops = entry.pop("flops", None)
        if flops and best:
            entry["ceiling_share"] = flops / 1e12 / best
        entry |= about
    return rows


def hardware():
    """What the figures were measured on, in a few words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{os.cpu_count()} cores of {name[1] if name else 'a CPU'}"


def table(rows):
    """The rows as aligned text."""
    lines = [("", "value", "unit", "peer", "its value", "ratio", "of ceiling")]
    for entry in rows:
        cells = [f"{entry[key]:{form}}" if key in entry else "" for key, form in
                 (("value", ".4g"), ("unit", ""), ("peer", ""), ("peer_value", ".4g"),
                  ("ratio", ".3f"), ("ceiling_share", ".0%"))]
        lines.append((entry["name"], *cells))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
                     for line in lines)


# ---- processes

def collect(jobs, seconds):
    """The rows of jobs (label, generator function, *its arguments), printed as they come. Each job
    runs in a process of its own: one that fails costs the others nothing. No job goes on when
    `seconds` have passed since the first began."""
    context, rows, end = multiprocessing.get_context("spawn"), [], time.monotonic() + seconds
    for label, *job in jobs:
        print(f"-- {label}", flush=True)
        box, send = context.Pipe(duplex=False)
        process = context.Process(target=answer, args=(send, *job))
        process.start()
        send.close()
        try:
            while box.poll(max(0, end - time.monotonic())):
                found = box.recv()
                if isinstance(found, str):
                    print(f"-- {label} {found}", flush=True)
                    break
                rows.append(found)
                print(f"{found['name']}  {found['value']:.4g} {found['unit']}", flush=True)
            else:
                print(f"-- {label}: no time left, of {seconds:.0f} s in all", flush=True)
        except EOFError:
            print(f"-- {label} failed: its process ended by itself", flush=True)
        process.kill()
        process.join()
    return rows


def answer(send, function, *arguments):
    """In the new process: sends the rows, and then how it ended."""
    try:
        for found in function(*arguments):
            send.send(found)
        send.send("is done")
    except ImportError as err:
        send.send(f"failed: {err.name} is not installed: pip install {err.name}")
    except Exception:       # whatever a variant dies of is shown, and the others go on
        send.send("\n".join(["failed:", *traceback.format_exc().splitlines()[-SHOWN:]]))


# ---- clocks

def device_here():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of_one(function):
    """Seconds of one call."""
    cost.synchronize(device_here())
    start = time.perf_counter()
    function()
    cost.synchronize(device_here())
    return time.perf_counter() - start


def seconds_of(function, seconds, in_a_row=1):
    """Mean seconds of a call after one that is not counted, over at least so many `seconds`.
    in_a_row: calls that follow each other without a wait for the device, as those of training."""
    seconds_of_one(function)
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        for _ in range(in_a_row):
            function()
        calls += in_a_row
        cost.synchronize(device_here())
    return (time.perf_counter() - start) / calls


@torch.no_grad()
def ceiling(tiny=False):
    """Yields the rate of a large bf16 product, run until a GPU has come to its limit."""
    device = device_here()
    side = 256 if tiny else cost.CEILING_SIDE.get(device.type, cost.SMALL_SIDE)
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    seconds = seconds_of(lambda: a @ b, 0.1 if tiny else SUSTAINED, in_a_row=10)
    yield row(CEILING, "", 2 * side**3 / seconds / 1e12, "TFLOP/s")


def peak_gb():
    """GB of GPU memory that this process has had at most; on a CPU, of resident memory, or nan."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GB
    status = Path("/proc/self/status")      # getrusage's begins with that of the parent process
    peak = re.search(r"VmHWM:\s*(\d+)", status.read_text() if status.exists() else "")
    return int(peak[1]) * 1024 / GB if peak else math.nan
