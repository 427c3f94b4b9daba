"""Rows, clocks, ceilings, and processes that measure one variant each.

A row is a dict {name, variant, what, value, unit} and, where they apply, {peer, peer_value, ratio,
ceiling_share}. ratio: value / peer_value; ceiling_share: share of what a large bf16 product has in
the same run. A variant has a process and a time limit of its own: one that fails or compiles for
too long costs the others nothing, and its peak memory is its own.
"""

import multiprocessing
import os
import platform
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from runtime import cost

GB = 1e9
CEILING = "sustained bf16 product"
SUSTAINED = 4.0                         # seconds of products, after which a GPU runs at its limit
SHORTEST = 5                            # seconds that are worth beginning with
SHOWN = 12                              # last lines of an error that are shown
LISTED = 60                             # kernels of a profile

ARITHMETIC = r"add|mul|gelu|silu|sub|div|sigmoid|erf|sum|exp|pow|mean|where|cos"
KINDS = (       # the first whose pattern is found in a kernel's name
    ("attention", r"^(?!triton).*(flash|fmha|sdpa|attention|compute_dot_do_o|convert_dq)"),
    ("optimizer and average", r"adam|lerp|multi_tensor|foreach"),
    ("norms", r"moments_kernel|combine_kernel|apply_kernel|whole_kernel|gradient_(sums_)?kernel|"
              r"(group|layer)_norm|RowwiseMoments|GammaBeta|norm_kernel"),
    ("convolutions and products", r"gemm|nvjet|cutlass|xmma|wgrad|dgrad|fprop|implicit|cudnn|"
                                  r"^(?!triton).*conv|addmm|\bmm\b|splitK"),
    ("copies and layouts", r"[Mm]emcpy|[Mm]emset|nchwToNhwc|nhwcToNchw|transpose|copy_kernel|"
                           r"direct_copy|CatArray|index|gather|"
                           rf"triton_poi_fused(?!.*({ARITHMETIC}))"),
    ("reductions", r"triton_(red|per)|reduce"),
    ("pointwise", r"triton|elementwise|geglu"),
)


# ---- rows

def row(variant, what, value, unit, **more):
    """A row. more: `flops` a second, which becomes a share of the ceiling; other notes."""
    return {"name": f"{variant}, {what}" if what else variant, "variant": variant, "what": what,
            "value": value, "unit": unit, **more}


def finish(rows, peers):
    """Puts peers' values and shares of the ceiling into rows, and where they were measured.

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
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or 'a CPU'}"


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
    """The rows of jobs (label, limit in seconds, generator function, *its arguments), in order,
    within `seconds` in all."""
    rows, end = [], time.monotonic() + seconds
    for label, limit, function, *arguments in jobs:
        limit = min(limit, end - time.monotonic())
        if limit < SHORTEST:
            print(f"-- {label}: no time left for it", flush=True)
            continue
        rows += in_process(label, limit, function, *arguments)
    return rows


def in_process(label, limit, function, *arguments):
    """The rows that a generator function yields in a process of its own, printed as they come."""
    print(f"-- {label}, at most {limit:.0f} s", flush=True)
    context, rows = multiprocessing.get_context("spawn"), []
    box, send = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(send, function, arguments))
    process.start()
    send.close()
    end, found = time.monotonic() + limit, {}
    try:
        while found is not None:
            if not box.poll(max(0, end - time.monotonic())):
                print(f"-- {label}: stopped after {limit:.0f} s", flush=True)
                break
            found = box.recv()
            if isinstance(found, str):
                print(f"-- {label} failed:\n{found}", flush=True)
            elif found:
                rows.append(found)
                print(f"{found['name']}  {found['value']:.4g} {found['unit']}", flush=True)
    except EOFError:
        print(f"-- {label} failed: its process ended by itself", flush=True)
    finally:
        stop(process)
    return rows


def answer(send, function, arguments):
    """In the new process: sends the rows, what went wrong, and None at the end."""
    if hasattr(os, "setsid"):
        os.setsid()         # a group of its own, with the compilers that it starts
    try:
        for found in function(*arguments):
            send.send(found)
    except ImportError as err:
        send.send(f"{err.name} is not installed: pip install {err.name}")
    except Exception:       # whatever a variant dies of is shown, and the others go on
        send.send("\n".join(traceback.format_exc().splitlines()[-SHOWN:]))
    send.send(None)


def stop(process):
    """Ends a process and, where the system has groups, the compilers that it started."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:          # it has ended, or has no group yet
        pass
    process.kill()
    process.join()


# ---- clocks

def device_here():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def median_seconds(function, runs, seconds=0.0):
    """Median seconds of a call that is timed by itself: at least `runs` calls, and `seconds`."""
    taken, start = [], time.perf_counter()
    while len(taken) < runs or time.perf_counter() - start < seconds:
        cost.synchronize(device_here())
        began = time.perf_counter()
        function()
        cost.synchronize(device_here())
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def seconds_in_a_row(function, runs, seconds):
    """Mean seconds of calls that follow each other without a wait, as those of training do, after
    one that is not counted: at least `runs` calls, and `seconds`."""
    function()
    cost.synchronize(device_here())
    start, calls = time.perf_counter(), 0
    while calls < runs or time.perf_counter() - start < seconds:
        for _ in range(runs):
            function()
        calls += runs
        cost.synchronize(device_here())
    return (time.perf_counter() - start) / calls


@torch.no_grad()
def ceilings(tiny=False):
    """Yields the rates of a large bf16 product, alone and one after the other, and of a copy."""
    device = device_here()
    yield row("bf16 product alone", "", cost.ceiling(device, "bf16") / 1e12, "TFLOP/s")
    side = 256 if tiny else cost.CEILING_SIDE.get(device.type, cost.SMALL_SIDE)
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    seconds = seconds_in_a_row(lambda: a @ b, 10, 0.1 if tiny else SUSTAINED)
    yield row(CEILING, "", 2 * side**3 / seconds / 1e12, "TFLOP/s")
    values = torch.zeros(8 * side**2, device=device)
    seconds = seconds_in_a_row(lambda: values.clone(), 3, 0.1)
    yield row("copy, bytes read and written", "", 2 * values.nbytes / seconds / GB, "GB/s")


def peak_gb():
    """GB of GPU memory that this process has had at most; on a CPU, of resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GB
    status = Path("/proc/self/status")
    if status.exists():         # getrusage's would begin with that of the process that started us
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / GB
    import resource
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


# ---- where the time goes

def kind(kernel):
    """The kind of work of a kernel's name."""
    return next((name for name, pattern in KINDS if re.search(pattern, kernel)), "others")


def profile(variant, function, calls=1):
    """Yields ms of a call by kind of kernel, and lists the kernels that take longest."""
    activity, cuda = torch.profiler.ProfilerActivity, torch.cuda.is_available()
    seconds = median_seconds(function, 3)
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profiled:
        for _ in range(calls):
            function()
        cost.synchronize(device_here())
    kernels, totals = [], {}
    for event in profiled.key_averages():
        ms = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / calls
        kernels.append((ms, event.count / calls, event.key))
        totals[kind(event.key)] = totals.get(kind(event.key), 0) + ms
    yield row(variant, "all", 1e3 * seconds, "ms")
    for label, ms in sorted(totals.items(), key=lambda item: -item[1]):
        yield row(variant, label, ms, "ms")
    yield row(variant, "gaps", max(0.0, 1e3 * seconds - sum(totals.values())), "ms")
    for ms, count, kernel in sorted(kernels, reverse=True)[:LISTED]:
        print(f"{ms:9.3f} ms {count:7.1f} x  [{kind(kernel)}]  {kernel[:150]}", flush=True)
