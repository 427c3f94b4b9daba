"""Rows, clocks, the ceiling, and processes that measure one variant each.

A row is a dict {name, variant, what, value, unit} and, where they apply, {peer, peer_value, ratio,
ceiling_share}. ratio: value / peer_value; ceiling_share: share of what a large bf16 product has in
the same run. Each variant has a process of its own, so its peak memory is its own too.
"""

import multiprocessing
import os
import re
import sys
import time
import traceback
from pathlib import Path

import torch

from runtime import cost
from runtime.log import peak_memory

CEILING = "sustained bf16 product"
SECONDS = 4.0                           # of a rate; in less a GPU does not come to its limit
WARM = 2                                # calls between the first and those that are counted
SHOWN = 12                              # last lines of an error that are shown


# ---- rows

def row(variant, what, value, unit, **more):
    """A row. more: `flops` a second, which becomes a share of the ceiling; other notes."""
    return {"name": f"{variant}, {what}" if what else variant, "variant": variant, "what": what,
            "value": value, "unit": unit, **more}


def finish(rows, peers):
    """Puts peers' values, shares of the ceiling, and where they were measured into rows. peers:
    {variant: the one that it is compared with}."""
    found = {(entry["variant"], entry["what"]): entry["value"] for entry in rows}
    about = {"hardware": hardware(), "torch": torch.__version__,
             "command": " ".join(["python -m benchmarks", *sys.argv[1:]])}
    for entry in rows:
        peer = peers.get(entry["variant"])
        value, flops = found.get((peer, entry["what"])), entry.pop("flops", None)
        if value:
            entry |= {"peer": peer, "peer_value": value, "ratio": entry["value"] / value}
        if flops and (CEILING, "") in found:
            entry["ceiling_share"] = flops / 1e12 / found[CEILING, ""]
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
    form = {"name": "", "value": ".4g", "unit": "", "peer": "", "peer_value": ".4g",
            "ratio": ".3f", "ceiling_share": ".0%"}
    lines = [[key.replace("_", " ") for key in form],
             *([f"{entry[key]:{how}}" if key in entry else "" for key, how in form.items()]
               for entry in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


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


def clock(function, in_a_row):
    """(seconds of the first call, mean seconds of later ones over at least SECONDS).
    in_a_row: calls that follow each other without a wait for the device, as those of training.
    ValueError where what the function gives is not finite."""
    def run(calls):
        cost.synchronize(device_here())
        start = time.perf_counter()
        for _ in range(calls):
            function()
        cost.synchronize(device_here())
        return time.perf_counter() - start

    first, times = run(1), []
    for _ in range(WARM):
        if not all(values.isfinite().all() for values in function()):
            raise ValueError("what is measured gives numbers that are not finite")
    while not times or sum(times) < SECONDS:
        times.append(run(in_a_row))
    return first, sum(times) / len(times) / in_a_row


def timed(variant, what, function, count, unit, work, in_a_row=1):
    """Yields how fast a function is that makes `count` pairs or views, of `work` FLOPs each; the
    time of its first call; and peak memory. unit: s/view, or how many a second."""
    torch.backends.cudnn.benchmark = torch.cuda.is_available()
    first, seconds = clock(function, in_a_row)
    rate = count / seconds
    yield row(variant, what, 1 / rate if unit == "s/view" else rate, unit, flops=work * rate)
    yield row(variant, f"{what}: first call", first, "s")
    yield row(variant, f"{what}: peak memory", peak_memory(device_here()), "GB")


@torch.no_grad()
def ceiling():
    """Yields the rate of a large bf16 product."""
    device = device_here()
    side = cost.CEILING_SIDE.get(device.type, cost.SMALL_SIDE)
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    _, seconds = clock(lambda: [a @ b], in_a_row=10)
    yield row(CEILING, "", 2 * side**3 / seconds / 1e12, "TFLOP/s")
