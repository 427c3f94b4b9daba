"""Variants of a benchmark, each in a process of its own, with a time limit, told as measured.

What fails or compiles for too long costs the others nothing. A benchmark calls `ask`, with its
module's name and a job; that module, run as a script, calls `answer(job)`, which calls `tell`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks import GB, row

ROOT = Path(__file__).parents[1]
MARK = "ROW "                           # begins the lines that a variant's process answers with
SHORTEST = 5                            # seconds that are worth beginning with
SHOWN = 12                              # lines of an error that are shown
LISTED = 60                             # kernels of a profile
SIDES = {"cuda": 8192, "cpu": 512}      # of the matrices of `ceiling`
SUSTAINED = 2.0                         # seconds of products, after which a GPU runs at its limit

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


# ---- the process that asks

def ask(module, job, limit):
    """Yields the rows of a job (a dict with "name"), as its process measures them."""
    name = job["name"]
    if limit < SHORTEST:
        print(f"-- {name}: no time left for it", flush=True)
        return
    print(f"-- {name}, at most {limit:.0f} s", flush=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen([sys.executable, "-m", module, json.dumps(job)], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=errors, text=True,
                                   start_new_session=True)
        late = threading.Event()
        alarm = threading.Timer(limit, lambda: (late.set(), stop(process)))
        alarm.start()
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
                else:
                    print(line, end="", flush=True)
            process.wait()
        finally:
            alarm.cancel()
            stop(process)
        if late.is_set():
            print(f"-- {name}: stopped after {limit:.0f} s", flush=True)
        elif process.returncode:
            errors.seek(0)
            print(f"-- {name} failed:\n{''.join(errors.readlines()[-SHOWN:])}", flush=True)


def stop(process):
    """Ends a process and, where the system has groups, the compilers that it started."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:      # all of the group have ended by themselves
            pass
    elif process.poll() is None:
        process.kill()
    process.wait()


def collect(module, jobs, seconds):
    """{name: {name, value, unit, ...}} of all jobs (dicts with "name" and "limit"), in their order,
    within `seconds`; printed as they come."""
    end, found = time.monotonic() + seconds, {}
    for job in jobs:
        for entry in ask(module, job, min(job["limit"], end - time.monotonic())):
            found[entry["name"]] = entry
            print(f"{entry['name']}  {entry['value']:.4g} {entry['unit']}", flush=True)
    return found


def rows_of(found, peers, ceiling):
    """The rows of what `collect` found.

    peers: {name: names of what it is compared with}, a row for each that was measured. An entry's
    `flops` a second become its share of the one named `ceiling`, in TFLOP/s.
    """
    rows, best = [], found.get(ceiling, {}).get("value")
    for name, entry in found.items():
        flops = entry.pop("flops", None)
        if flops and best:
            entry["ceiling_share"] = flops / 1e12 / best
        there = [peer for peer in peers.get(name, ()) if peer in found]
        rows += [row(**entry, peer=peer, peer_value=found[peer]["value"]) for peer in there]
        rows += [row(**entry)] * (not there)
    return rows


# ---- the process that answers

def tell(name, value, unit, **more):
    """Sends a row to the process that asked."""
    print(MARK + json.dumps({"name": name, "value": value, "unit": unit, **more}), flush=True)


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(function, runs, seconds=0.0):
    """Median seconds of a call that is timed by itself: at least `runs` calls, and `seconds`."""
    taken, start = [], time.perf_counter()
    while len(taken) < runs or time.perf_counter() - start < seconds:
        sync()
        began = time.perf_counter()
        function()
        sync()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def seconds_in_a_row(function, runs, seconds):
    """Mean seconds of calls that follow each other without a wait, as those of training and of
    encoding do, after one that is not counted: at least `runs` calls, and `seconds`."""
    function()
    sync()
    start, calls = time.perf_counter(), 0
    while calls < runs or time.perf_counter() - start < seconds:
        for _ in range(runs):
            function()
        calls += runs
        sync()
    return (time.perf_counter() - start) / calls


@torch.no_grad()
def ceiling():
    """FLOP/s of large bf16 products, burst and sustained."""
    side = SIDES[device().type]
    a, b = torch.randn(2, side, side, device=device()).bfloat16()
    a @ b
    work = 2 * side**3
    burst = work / median_seconds(lambda: a @ b, 5)
    seconds = SUSTAINED if device().type == "cuda" else 0.1
    return burst, work / seconds_in_a_row(lambda: a @ b, 10, seconds)


def peak_gb():
    """GB of GPU memory that this process has had at most."""
    return torch.cuda.max_memory_allocated() / GB


def kind(kernel):
    return next((name for name, pattern in KINDS if re.search(pattern, kernel)), "others")


def where(name, function, calls=1):
    """Tells ms of a call by kind of kernel, and lists the kernels that take longest."""
    activity = torch.profiler.ProfilerActivity
    cuda = torch.cuda.is_available()
    seconds = median_seconds(function, 3)
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profiled:
        for _ in range(calls):
            function()
        sync()
    kernels, totals = [], {}
    for event in profiled.key_averages():
        ms = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / calls
        kernels.append((ms, event.count / calls, event.key))
        totals[kind(event.key)] = totals.get(kind(event.key), 0) + ms
    tell(f"{name}: all", 1e3 * seconds, "ms")
    for label, ms in sorted(totals.items(), key=lambda item: -item[1]):
        tell(f"{name}: {label}", ms, "ms")
    tell(f"{name}: gaps", max(0.0, 1e3 * seconds - sum(totals.values())), "ms")
    for ms, count, kernel in sorted(kernels, reverse=True)[:LISTED]:
        print(f"{ms:9.3f} ms {count:7.1f} x  [{kind(kernel)}]  {kernel[:150]}", flush=True)
