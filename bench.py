"""Speed and memory, beside peers and against ceilings that are measured in the same run.

    python bench.py load [--json FILE]

Each benchmark is a function from its options to rows, in BENCHMARKS. A row is a dict {name, value,
unit, peer, peer_value, ratio, ceiling_share, hardware, torch, command}; what does not apply is left
out. ratio: value / peer_value. ceiling_share: share of what the machine could do at best.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import checkpoint
import configs
import model
from tensorfile import nbytes, read_file

GB = 1e9


# ------------------------------------------------------------------------------ rows

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


# ------------------------------------------------------------------------------ load

def zero123(channels):
    """ZeroNVS with zero123-xl's structure on the meta device; the UNet is `channels` wide."""
    source = configs.Source("none", "co3d", "none", 1.0)
    with torch.device("meta"):
        return model.build(configs.Config((source,), mode="3dof", model_channels=channels))


def synthetic_checkpoint(path, channels):
    """Writes a file of zero123-xl's structure: weights, average, AdamW's two moments; random bytes.

    In memory are no more than a few megabytes of it. 15.5 GB at 320 channels.
    """
    def blank(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype)    # never touched, so never resident

    module = zero123(channels)
    weights = module.state_dict()
    trained = [name for name in weights if name.startswith((checkpoint.UNET, "cc_projection."))]
    state = {name: blank(tensor) for name, tensor in weights.items()}
    state |= {checkpoint.ema_name(name): blank(weights[name]) for name in trained
              if name.startswith(checkpoint.UNET)}
    moments = {i: {"step": 1, "exp_avg": blank(weights[name]), "exp_avg_sq": blank(weights[name])}
               for i, name in enumerate(trained)}
    with torch.serialization.skip_data():
        torch.save({"epoch": 1, "global_step": 165_000, "state_dict": state,
                    "optimizer_states": [{"state": moments, "param_groups": []}]}, path)
    block = os.urandom(1 << 24)
    tensors = read_file(path)
    with open(path, "r+b") as file:
        for entry in (*tensors.entries.values(), *tensors.others.values()):
            file.seek(entry.storage.offset)
            for start in range(0, entry.storage.nbytes, len(block)):
                file.write(block[:entry.storage.nbytes - start])
        file.flush()
        os.fsync(file.fileno())


def load_ours(path, channels):
    """(seconds, peak memory, bytes kept) of load_model, until every byte is in memory."""
    module = zero123(channels)
    start = time.perf_counter()
    checkpoint.load_model(module, path)
    touch(module)
    seconds = time.perf_counter() - start
    return seconds, peak_memory(), sum(map(nbytes, module.state_dict().values()))


def touch(module):
    """Reads a number of every page of a module's tensors, so that none is only mapped."""
    page = 4096 // torch.float32.itemsize
    sum(float(tensor.flatten()[::page].sum()) for tensor in module.state_dict().values())


def load_torch(path, channels, mmap):
    """(seconds, peak memory) of torch.load and assigning, until every byte is in memory."""
    module = zero123(channels)
    start = time.perf_counter()
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)["state_dict"]
    module.load_state_dict(state, strict=False, assign=True)
    del state
    touch(module)
    return time.perf_counter() - start, peak_memory()


def read_bytes(path, channels):
    """Seconds to read the bytes that `load_ours` keeps, into one buffer over and over."""
    wanted, buffer = set(zero123(channels).state_dict()), memoryview(bytearray(1 << 22))
    entries = [entry for name, entry in read_file(path).entries.items() if name in wanted]
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        for entry in entries:
            file.seek(entry.storage.offset)
            left = entry.storage.nbytes
            while left:
                left -= file.readinto(buffer[:left])
    return time.perf_counter() - start


def forget(path):
    """Drops a file from the system's cache, so that it is read from the disk, where that works."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def file_bytes(channels):
    """Size of the synthetic file."""
    weights = zero123(channels).state_dict()
    sizes = {name: nbytes(tensor) for name, tensor in weights.items()}
    unet = sum(size for name, size in sizes.items() if name.startswith(checkpoint.UNET))
    return sum(sizes.values()) + 3 * unet


def load(given):
    """Loading the model from a file of zero123-xl's structure: memory, and time."""
    if given.repeat < 1:
        raise ValueError(f"--repeat {given.repeat}: at least one run is needed")
    channels, step = given.channels, 32         # what GroupNorm divides widths by
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        room = 0.9 * shutil.disk_usage(folder).free
        while channels > step and file_bytes(channels) > room:
            channels -= step
        path = Path(folder) / "synthetic.ckpt"
        if channels != given.channels:
            print(f"{folder} has {room / GB:.1f} GB: the UNet is {channels} channels wide, not "
                  f"{given.channels}", file=sys.stderr)
        synthetic_checkpoint(path, channels)
        size = path.stat().st_size / GB

        def measure(function, *arguments):
            return in_fresh_process(function, path, channels, *arguments)

        rows = [row("load: size of the file", size, "GB")]
        ours, theirs = [], []
        while forget(path) and len(ours) < given.repeat:        # in turns: a disk has its moods
            theirs.append(measure(read_bytes))
            forget(path)
            ours.append(measure(load_ours)[0])
        if ours:
            rows.append(row("load: time, from the disk", min(ours), "s", "reading the bytes",
                            min(theirs)))
        measure(read_bytes)         # now they are in the system's cache
        warm, peak, kept = min(measure(load_ours) for _ in range(given.repeat))
        bytes_warm = min(measure(read_bytes) for _ in range(given.repeat))
        rows += [row("load: time, from the cache", warm, "s", "reading the bytes", bytes_warm),
                 row("load: peak memory", peak / GB, "GB", "bytes kept", kept / GB, kept / peak)]
        for mmap, peer in ((True, "torch.load(mmap=True)"), (False, "torch.load")):
            if not mmap and free_memory() < 1.5 * size * GB:
                print(f"no {peer} beside it: it needs {size:.1f} GB of memory, "
                      f"{free_memory() / GB:.1f} are free", file=sys.stderr)
                continue
            seconds, its_peak = measure(load_torch, mmap)
            rows += [row("load: time, from the cache", warm, "s", peer, seconds),
                     row("load: peak memory", peak / GB, "GB", peer, its_peak / GB)]
    return rows


def free_memory():
    """Bytes of memory that a process can have, where the system says so; else without limit."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else float("inf")


def load_options(parser):
    parser.add_argument("--channels", type=int, default=320, help="width of the UNet; 320 is "
                        "zero123-xl's, 15.5 GB; 32 makes 1.8 GB")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the file is "
                        "written, and removed afterwards")
    parser.add_argument("--repeat", type=int, default=3, help="runs of which the best counts")


# ------------------------------------------------------------------------------ command line

# name -> (function from options to rows, function that adds the options to a parser)
BENCHMARKS = {"load": (load, load_options)}


def main(argv):
    parser = argparse.ArgumentParser(description="Speed and memory, beside peers and ceilings.")
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, (function, add_options) in BENCHMARKS.items():
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        command.add_argument("--json", default="", help="file to write the rows to")
        add_options(command)
    given = parser.parse_args(argv)
    function, _ = BENCHMARKS[given.benchmark]
    rows = function(given)
    print(table(rows))
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as err:
        print(f"bench.py: {err}", file=sys.stderr)
        sys.exit(2)
